"""Put the trained parts together in the layout that ships: `sd`, `clip`, `judges`, `images`."""

import json
import shutil
from pathlib import Path

import torch

from mmpeft.pocket.rebuild.denoiser import build_noise_schedule


def assemble(work: Path, folder: Path) -> None:
    """Copy the parts of a work folder into one folder, models in float16.

    Args:
        work: holds `tokenizer`, `autoencoder`, `clip`, `denoiser`, `judges` and `images`.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "autoencoder"),
        text_encoder=CLIPTextModel.from_pretrained(work / "denoiser" / "text_encoder"),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(work / "denoiser" / "unet"),
        scheduler=build_noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder / "sd")
    for part in ("unet", "vae"):
        _forget_path(folder / "sd" / part / "config.json")
    CLIPModel.from_pretrained(work / "clip").half().save_pretrained(folder / "clip")
    for target in (folder / "clip", folder / "sd" / "tokenizer"):
        shutil.copytree(work / "tokenizer", target, dirs_exist_ok=True)
    for part in ("judges", "images"):
        shutil.copytree(work / part, folder / part)


def _forget_path(config: Path) -> None:
    """Take out where the model was loaded from, which diffusers writes down."""
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2) + "\n")
