"""One training step of the style preset at the true size of Stable Diffusion 1.5, with random weights.

    python benchmarks/sd15_step.py            # about two minutes; prints seconds per step and peak memory

The architecture is the published configuration; the weights are noise, so pictures mean nothing and time and memory
mean everything. Training runs in a process of its own through the command line, as a person's would.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from sd15_shapes import unet_of_sd15
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mmpeft.backbones.pocket import image_folder, pocket_folder

BASE, RUN = Path("runs/sd15-random"), Path("runs/sd15-step")
STEPS = 3


def build(folder: Path) -> None:
    """Write a Stable Diffusion 1.5 with random bfloat16 weights; the tokenizer is the pocket base's."""
    torch.set_default_dtype(torch.bfloat16)
    unet = unet_of_sd15(torch.bfloat16)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            projection_dim=768,
        )
    )
    torch.set_default_dtype(torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(pocket_folder() / "tokenizer", model_max_length=77)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae,
        text,
        tokenizer,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def main() -> None:
    if "--build" in sys.argv:
        build(BASE)
        return
    if not (BASE / "model_index.json").exists():
        # Its own process, so that building counts into no figure.
        subprocess.run([sys.executable, __file__, "--build"], check=True)
    shutil.rmtree(RUN, ignore_errors=True)
    images = image_folder("high-contrast") / "train"
    settings = (
        f"--base {BASE} --data.resolution 256 --train.batch_size 1 --train.steps {STEPS} --precision bf16"
    )
    settings += " --objective.prior.pictures 0"  # drawing at this size takes a CPU minutes a picture
    command = [
        "train",
        str(images),
        "--preset",
        "style",
        "--trigger",
        "ink style",
        "--out",
        str(RUN),
        *settings.split(),
    ]
    subprocess.run([sys.executable, "-m", "mmpeft.cli", *command], check=True)
    measured = json.loads((RUN / "result.json").read_text())

    print(json.dumps({
        "seconds_per_step": round(measured["loop_seconds"] / STEPS, 2),
        "peak_memory_gigabytes": round(measured["peak_memory_bytes"] / 1e9, 2),
        "with_verification_gigabytes": round(measured["peak_memory_bytes_with_verification"] / 1e9, 2),
        "trainable_parameters": measured["trainable_parameters"],
        "base_parameters": measured["base_parameters"],
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
