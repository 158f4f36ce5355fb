import importlib.util

import pytest
import torch

from mmpeft.attention import active_attention, measure_attention, set_attention
from mmpeft.errors import ConfigError, MissingDependency

CPU = torch.device("cpu")


@pytest.fixture
def models(tiny_sd_folder):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    return {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}


def outputs(models):
    """Outputs of all three models and the gradient with respect to the text."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 500, (2, 16), generator=generator)
    text = models["text_encoder"](tokens).last_hidden_state
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    prediction = models["unet"](noisy, torch.tensor([5, 900]), text).sample
    moments = models["vae"].encode(torch.rand(2, 3, 32, 32, generator=generator)).latent_dist.mean
    (gradient,) = torch.autograd.grad(prediction.square().sum(), text)
    return text, prediction, moments, gradient


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        ("auto", "sdpa (unet, vae, text_encoder)"),
        ("sdpa", "sdpa (unet, vae, text_encoder)"),
        ("flash", "flash (unet, vae), sdpa (text_encoder)"),
        ("sliced", "sliced (unet, vae), sdpa (text_encoder)"),
        ("eager", "eager (unet, vae, text_encoder)"),
    ],
)
def test_each_choice_is_really_active_and_agrees_with_eager(models, choice, line):
    set_attention(models, "eager", device=CPU)
    expected = outputs(models)
    assert set_attention(models, choice, device=CPU) == line
    for actual, wanted in zip(outputs(models), expected, strict=True):
        # atol: float32 softmax sums in another order
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_every_switch_leads_back(models):
    for choice in ("flash", "sliced", "eager", "sdpa"):
        set_attention(models, choice, device=CPU)
        assert active_attention(models["unet"]) == choice


def test_what_is_active_is_read_from_the_modules_and_not_from_what_was_asked(models):
    set_attention(models, "eager", device=CPU)
    models["unet"].set_attention_backend("_native_math")  # changes nothing on a classic UNet, in silence
    assert active_attention(models["unet"]) == "eager"


def test_flash_runs_the_flash_kernel(models):
    set_attention(models, "flash", device=CPU)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs(models)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] >= len(models["unet"].attn_processors)


def test_a_model_without_attention_is_left_alone():
    assert set_attention({"net": torch.nn.Linear(2, 2)}, "sdpa", device=CPU) == ""
    assert active_attention(torch.nn.Linear(2, 2)) == "none"


def test_adapters_survive_the_switch(models):
    from peft import LoraConfig

    models["unet"].add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    set_attention(models, "eager", device=CPU)
    expected = outputs(models)[1]
    assert set_attention(models, "flash", device=CPU).startswith("flash (unet")
    torch.testing.assert_close(outputs(models)[1], expected, rtol=1e-4, atol=1e-5)


def test_xformers_on_a_cpu_says_what_to_use_instead(models):
    with pytest.raises(ConfigError, match="xformers runs on CUDA only and this model is on cpu; use sdpa"):
        set_attention(models, "xformers", device=CPU)
    assert active_attention(models["unet"]) == "sdpa"


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_xformers_that_is_not_installed_says_how_to_get_it(models):
    with pytest.raises(MissingDependency, match=r"pip install 'mmpeft\[xformers\]'"):
        set_attention(models, "xformers", device=torch.device("cuda"))


def test_flash_that_cannot_run_says_so(models):
    with pytest.raises(ConfigError, match=r"flash cannot run in float8_e5m2 on cpu here .*; use sdpa"):
        set_attention(models, "flash", device=CPU, dtype=torch.float8_e5m2)


def test_measuring_leaves_the_fastest_active(models):
    best, seconds = measure_attention(models, lambda: outputs(models), device=CPU, repeats=1)
    assert set(seconds) == {"sdpa", "flash", "eager"}
    assert seconds[best] == min(seconds.values())
    assert active_attention(models["unet"]) == best
