"""Tiny real models, built in code with fixed seeds; thread settings that keep busy machines fast."""

import os
import shutil

# Before torch is imported: spinning threads make it 20 to 40 times slower when cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path
from typing import Literal

import hypothesis
import pytest
import torch

# A law holds or not; how long a busy machine takes to try it says nothing. Continuous integration tries the same
# examples every time.
hypothesis.settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
hypothesis.settings.load_profile("untimed")


def tiny_tokenizer(token_limit: int = 16):
    """A CLIP tokenizer that knows every byte and four words."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "i n", "in k</w>", "r e", "re d</w>"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    pairs = [tuple(merge.split()) for merge in merges]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=token_limit)


def tiny_stable_diffusion(prediction: Literal["epsilon", "v"], seed: int = 0):
    """A StableDiffusionPipeline of 85 thousand parameters: VAE factor 4, one downsampling, 32 x 32 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
        )
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        text_encoder = CLIPTextModel(text_config)
    zero_terminal_snr = prediction == "v"
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if prediction == "v" else "epsilon",
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing" if zero_terminal_snr else "leading",
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny Stable Diffusion that predicts v with zero terminal SNR; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-sd"
    tiny_stable_diffusion("v").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd_epsilon_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny Stable Diffusion that predicts epsilon; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-sd-epsilon"
    tiny_stable_diffusion("epsilon").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def attach_randomly():
    """A function that attaches a method to a pipeline, fills it with seeded numbers, and gives the adapter.

    The pipeline is left with the method attached, as after training.
    """
    from mmpeft import plugins
    from mmpeft.adapter import Adapter
    from mmpeft.injection import find_targets

    def attach(
        pipeline,
        method="lora",
        seed=0,
        card=None,
        unet=("*attn*.to_*", "*.conv1", "*.time_emb_proj"),
        **settings,
    ):
        targets = {"unet": unet, "text_encoder": settings.pop("text_encoder", ("*.q_proj", "*.fc1"))}
        layers = {}
        generator = torch.Generator().manual_seed(seed)
        method_type = plugins.get("method", method)
        for component, patterns in targets.items():
            if not patterns:
                continue
            model = getattr(pipeline, component)
            chosen = method_type(method_type.settings_type(**settings))
            chosen.attach(model, find_targets(component, model, {}, patterns))
            with torch.no_grad():
                for name, parameter in chosen.parameters(model).items():
                    is_magnitude = name.endswith("magnitude_vector")
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(parameter * (1 + 0.2 * noise) if is_magnitude else 0.3 * noise)
            layers |= {f"{component}.{name}": layer for name, layer in chosen.layer_adapters(model).items()}
        return Adapter(layers, card)

    return attach


# The tiny base with the original names.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Where the tiny UNet's blocks stand in the original numbering: one resnet a down block, two an up block.
UNET_PLACES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}


def original_unet_name(name):
    place = max((p for p in UNET_PLACES if name.startswith(p + ".")), key=len)
    rest = name.removeprefix(place + ".")
    first, _, last = rest.partition(".")
    rest = f"{RESNET[first]}.{last}" if "resnets" in place else rest
    return f"model.diffusion_model.{UNET_PLACES[place]}.{rest}"


def original_vae_name(name):
    for ours, theirs in [
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0", "mid.attn_1"),
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("resnets", "block"),
    ]:
        name = name.replace(ours, theirs)
    for block in range(3):
        name = name.replace(f"down_blocks.{block}", f"down.{block}")
        name = name.replace(f"up_blocks.{block}", f"up.{2 - block}")
    return f"first_stage_model.{name}"


@pytest.fixture(scope="session")
def single_file(tiny_sd_folder, tmp_path_factory):
    """The tiny base that predicts v as one file with the names of CompVis' Stable Diffusion 1; do not write to it."""
    from safetensors.torch import save_file

    from mmpeft.backbones.stable_diffusion_files import load_pipeline

    pipeline = load_pipeline(str(tiny_sd_folder))
    weights = {original_unet_name(name): w for name, w in pipeline.unet.state_dict().items()}
    for name, weight in pipeline.vae.state_dict().items():
        original = original_vae_name(name)
        # The original's VAE attention is made of 1 x 1 convolutions.
        is_projection = ".attn_1." in original and weight.ndim == 2
        weights[original] = weight[:, :, None, None].contiguous() if is_projection else weight
    for name, weight in pipeline.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name}"] = weight
    path = tmp_path_factory.mktemp("single") / "tiny-single.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture
def config_folder(tiny_sd_folder, tmp_path):
    """The tiny base's configuration and tokenizer, without any weight."""
    return shutil.copytree(
        tiny_sd_folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")
    )
