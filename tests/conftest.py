"""Tiny real models, built in code with fixed seeds; thread settings that keep busy machines fast."""

import os

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
