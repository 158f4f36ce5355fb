import functools
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig

from mmpeft.backbones.fingerprint import compare
from mmpeft.backbones.stable_diffusion import StableDiffusion, choose_dtype
from mmpeft.backbones.stable_diffusion_files import load_pipeline
from mmpeft.config import BaseSettings
from mmpeft.errors import BaseError, ConfigError
from mmpeft.injection import find_targets


def opened(folder, **settings):
    return StableDiffusion.open(BaseSettings(name=str(folder), **{"precision": "fp32", **settings}))


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return opened(tiny_sd_folder)


def noisy_input(backbone, count=2, text=("a cat", "ink")):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        conditioning = backbone.encode_text(list(text)[:count])
    return torch.randn(count, 4, 8, 8, generator=generator), torch.tensor([3, 980])[:count], conditioning


def with_adapter(backbone):
    torch.manual_seed(0)
    unet = backbone.components["unet"]
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "conv1"], init_lora_weights=False))
    return [p for p in unet.parameters() if p.requires_grad]


def gradients(backbone, parameters):
    prediction = backbone.predict(*noisy_input(backbone))
    return torch.autograd.grad(prediction.square().mean(), parameters)


def array(picture):
    return np.asarray(picture).astype(int)


def test_the_pocket_base_opens_by_name():
    backbone = StableDiffusion.open(BaseSettings(precision="fp32"))
    assert backbone.title == "pocket"
    assert (backbone.size_multiple, backbone.resolution, backbone.token_limit) == (16, 64, 30)
    assert backbone.noise_schedule.prediction == "v"
    assert backbone.noise_schedule.snr(torch.tensor([999])).item() == 0
    assert backbone.parameter_count > 15_000_000
    assert all(not p.requires_grad for model in backbone.components.values() for p in model.parameters())
    assert all(not model.training for model in backbone.components.values())


def test_epsilon_bases_are_known_by_their_configuration(tiny_sd_epsilon_folder):
    assert opened(tiny_sd_epsilon_folder).noise_schedule.prediction == "epsilon"


def test_sizes_follow_the_architecture(backbone):
    # VAE factor 4, one downsampling in the UNet; latents of 8 x 8
    assert (backbone.size_multiple, backbone.resolution) == (8, 32)


def test_predicting_equals_the_stock_pipeline(backbone):
    noisy, timesteps, conditioning = noisy_input(backbone)
    plain = backbone.plain_pipeline()
    with torch.no_grad():
        text, _ = plain.encode_prompt(["a cat", "ink"], "cpu", 1, False)
        expected = plain.unet(noisy, timesteps, text).sample
        actual = backbone.predict(noisy, timesteps, conditioning)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # channels-last sums in another order


def test_pictures_equal_the_stock_pipeline(backbone):
    plain = backbone.plain_pipeline()
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        ["a cat", "a red dog"],
        negative_prompt=["ink", ""],
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
    ).images
    actual = backbone.generate(
        ["a cat", "a red dog"], negative_prompts=["ink", ""], seeds=[5, 6], steps=3, guidance=2.0
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert np.abs(array(ours) - array(theirs)).max() <= 1  # one rounding of 255


def test_a_picture_does_not_depend_on_its_neighbours(backbone):
    draw = {"steps": 2, "guidance": 3.0}
    one, two = backbone.generate(["a cat", "ink"], seeds=[1, 2], **draw)
    other = backbone.generate(["a cat", "a red dog"], seeds=[1, 77], **draw)[0]
    alone = backbone.generate(["ink"], seeds=[2], **draw)[0]
    assert np.array_equal(array(one), array(other))
    assert np.abs(array(two) - array(alone)).max() <= 1  # kernels may differ with the batch's size


def test_pictures_take_their_size_and_leave_training_mode_as_it_was(tiny_sd_folder):
    backbone = opened(tiny_sd_folder)
    backbone.components["unet"].train()
    (picture,) = backbone.generate(["ink"], seeds=[0], steps=1, guidance=1.0, width=48, height=40)
    assert picture.size == (48, 40)
    assert backbone.components["unet"].training
    assert not backbone.components["text_encoder"].training


def test_more_prompts_than_fit_at_once_are_all_drawn(backbone):
    pictures = backbone.generate(["ink"] * 33, seeds=range(33), steps=1, guidance=1.0)
    assert len(pictures) == 33
    assert backbone.generate([], seeds=[], steps=1, guidance=1.0) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"width": 36}, "multiples of 8 for tiny-sd; got 36 x 32"),
        ({"seeds": [1]}, "got 2 prompts, 2 negative"),
    ],
)
def test_impossible_pictures_are_refused(backbone, change, text):
    with pytest.raises(ConfigError, match=text):
        backbone.generate(["a", "b"], **{"seeds": [1, 2], "steps": 1, "guidance": 1.0, **change})


def test_the_posterior_is_in_the_denoisers_scale(backbone):
    pixels = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, log_variance = backbone.encode_image(pixels)
    with torch.no_grad():
        posterior = backbone.plain_pipeline().vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean * 0.18215, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((log_variance / 2).exp(), posterior.std * 0.18215, rtol=1e-4, atol=1e-6)
    assert mean.shape == (2, 4, 8, 10)
    assert mean.dtype == torch.float32
    assert mean.is_contiguous()


def test_a_caption_is_encoded_alike_alone_and_in_a_batch(backbone):
    captions = ["a red cat", "", "ink " * 40]
    with torch.no_grad():
        together = backbone.encode_text(captions)["text"]
        alone = torch.cat([backbone.encode_text([caption])["text"] for caption in captions])
    assert together.shape == (3, 16, 16)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)  # float32 sums


def test_tokens_are_counted_without_marks_or_truncation(backbone):
    assert backbone.token_limit == 14
    assert backbone.token_count("a red cat") == 3
    assert backbone.token_count("ink " * 40) == 40


def test_gradients_flow_into_a_text_encoder_that_learns(tiny_sd_folder):
    backbone = opened(tiny_sd_folder)
    weight = backbone.components["text_encoder"].get_parameter("encoder.layers.0.self_attn.q_proj.weight")
    weight.requires_grad_(True)
    noisy, timesteps, _ = noisy_input(backbone)
    backbone.predict(noisy, timesteps, backbone.encode_text(["a cat", "ink"])).sum().backward()
    assert weight.grad.abs().max() > 0


def test_clip_skip_leaves_layers_off(tiny_sd_folder):
    skipping = opened(tiny_sd_folder, clip_skip=1)
    encoder = skipping.plain_pipeline().text_encoder
    tokens = skipping._tokenizer(
        ["a cat"], padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        hidden = encoder(tokens, output_hidden_states=True).hidden_states
        actual = skipping.encode_text(["a cat"])["text"]
    torch.testing.assert_close(actual, encoder.final_layer_norm(hidden[1]))
    assert not torch.allclose(actual, encoder.final_layer_norm(hidden[2]))


def test_clip_skip_of_every_layer_is_refused(tiny_sd_folder):
    with pytest.raises(ConfigError, match=r"base.clip_skip: the text encoder has 2 layers.*got 2"):
        opened(tiny_sd_folder, clip_skip=2)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("bf16", 0.05), ("fp16", 0.01)],  # 8 and 11 bits of mantissa, through some twenty layers
)
def test_half_precision_is_close_to_float32_with_a_float32_adapter(tiny_sd_folder, precision, tolerance):
    full, half = opened(tiny_sd_folder), opened(tiny_sd_folder, precision=precision)
    expected, actual = (gradients(b, with_adapter(b)) for b in (full, half))
    with torch.no_grad():
        outputs = [b.predict(*noisy_input(b)) for b in (full, half)]
    assert outputs[1].dtype == torch.float32
    assert (outputs[1] - outputs[0]).norm() < tolerance * outputs[0].norm()
    assert (outputs[1] - outputs[0]).norm() > 0
    assert {gradient.dtype for gradient in actual} == {torch.float32}
    error = sum((a - e).square().sum() for a, e in zip(actual, expected, strict=True)).sqrt()
    assert error < 3 * tolerance * sum(e.square().sum() for e in expected).sqrt()


def test_exactly_computes_in_float32(tiny_sd_folder):
    full, half = opened(tiny_sd_folder), opened(tiny_sd_folder, precision="bf16")
    arguments = noisy_input(full)
    with torch.no_grad():
        rounded = half.predict(*arguments)
        with half.exactly():
            exact = half.predict(*arguments)
        again = half.predict(*arguments)
    assert torch.equal(exact, full.predict(*arguments))
    assert torch.equal(again, rounded)
    assert not torch.equal(exact, rounded)


def test_storing_matrices_in_half_precision_changes_no_number(tiny_sd_folder, monkeypatch):
    arguments = noisy_input(opened(tiny_sd_folder, precision="bf16"))
    kept = opened(tiny_sd_folder, precision="bf16")
    monkeypatch.setattr("mmpeft.backbones.stable_diffusion._STORE_HALF_ABOVE", 0)
    stored = opened(tiny_sd_folder, precision="bf16")
    assert stored.components["unet"].conv_in.weight.dtype == torch.bfloat16
    assert kept.components["unet"].conv_in.weight.dtype == torch.float32
    assert stored.components["unet"].conv_norm_out.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(stored.predict(*arguments), kept.predict(*arguments))
        plain = stored.plain_pipeline()
        expected = plain.unet(*arguments[:2], arguments[2]["text"]).sample
        with stored.exactly():
            torch.testing.assert_close(stored.predict(*arguments), expected, rtol=1e-4, atol=1e-5)
    assert stored.components["unet"].conv_in.weight.dtype == torch.bfloat16
    for ours, theirs in zip(
        gradients(stored, with_adapter(stored)), gradients(kept, with_adapter(kept)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_pipeline_that_is_in_half_precision_keeps_its_matrices_and_computes(tiny_sd_folder, monkeypatch):
    monkeypatch.setattr("mmpeft.backbones.stable_diffusion._STORE_HALF_ABOVE", 0)
    pipeline = load_pipeline(str(tiny_sd_folder))
    for model in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    backbone = StableDiffusion(pipeline, BaseSettings(name=str(tiny_sd_folder), precision="bf16"))
    assert backbone.components["unet"].conv_in.weight.dtype == torch.bfloat16
    assert backbone.components["unet"].conv_norm_out.weight.dtype == torch.float32
    with torch.no_grad():
        assert backbone.predict(*noisy_input(backbone)).isfinite().all()


def test_gradient_checkpointing_gives_the_same_gradients(tiny_sd_folder):
    plain, checkpointed = opened(tiny_sd_folder), opened(tiny_sd_folder, gradient_checkpointing=True)
    assert checkpointed.components["unet"].is_gradient_checkpointing
    results = []
    for backbone in (plain, checkpointed):
        parameters = with_adapter(backbone)
        backbone.components["unet"].train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            prediction = backbone.predict(*noisy_input(backbone))
        results.append((torch.autograd.grad(prediction.square().mean(), parameters), sum(saved)))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert results[1][1] < results[0][1]


def test_channels_last_changes_the_layout_and_not_the_result(tiny_sd_folder):
    on, off = opened(tiny_sd_folder), opened(tiny_sd_folder, channels_last=False)
    weight = on.components["unet"].conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not off.components["unet"].conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        actual, expected = on.predict(*noisy_input(on)), off.predict(*noisy_input(off))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert on.vae_fingerprint == off.vae_fingerprint


def test_attention_is_switched_and_said(tiny_sd_folder):
    assert opened(tiny_sd_folder).attention == "sdpa (unet, text_encoder, vae)"
    assert opened(tiny_sd_folder, attention="eager").attention == "eager (unet, text_encoder, vae)"


def test_target_groups_find_the_layers(backbone):
    unet, text = backbone.components["unet"], backbone.components["text_encoder"]
    found = {
        group: set(find_targets("unet", unet, backbone.target_groups, (group,)).values())
        for group in ("attention", "mlp", "conv", "time", "attention+mlp", "all")
    }
    assert found["attention+mlp"] == found["attention"] | found["mlp"]
    assert found["all"] == found["attention"] | found["mlp"] | found["conv"]
    assert {name.rsplit("attn", 1)[1][2:] for name in found["attention"]} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    assert "down_blocks.0.downsamplers.0.conv" in found["conv"]
    assert "up_blocks.0.upsamplers.0.conv" in found["conv"]
    assert {"conv_in", "conv_out"}.isdisjoint(found["all"])
    layers = find_targets("text_encoder", text, backbone.target_groups, ("all",))
    assert len(layers) == 2 * 6
    assert "text_model.encoder.layers.0.self_attn.q_proj" in layers.values()


def test_the_pocket_bases_pooling_is_no_attention_target():
    backbone = StableDiffusion.open(BaseSettings(precision="fp32"))
    unet = backbone.components["unet"]
    names = find_targets("unet", unet, backbone.target_groups, ("all",)).values()
    assert not [name for name in names if name.startswith("add_embedding")]


def test_a_base_is_known_again_in_any_precision_and_under_adapters(tiny_sd_folder, tiny_sd_epsilon_folder):
    layers = [
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ]
    ours = opened(tiny_sd_folder).fingerprint(layers)
    adapted = opened(tiny_sd_folder, precision="bf16")
    with_adapter(adapted)
    assert compare(ours, adapted.fingerprint(layers)).kind == "same"
    other = compare(ours, opened(tiny_sd_epsilon_folder).fingerprint(layers))
    assert other.reason == "one predicts v, the other epsilon"
    with pytest.raises(
        BaseError,
        match=r"tiny-sd has no layer 'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_x'; did you mean",
    ):
        adapted.fingerprint(["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_x"])


def test_digests_tell_other_weights_and_other_precision(tiny_sd_folder, tmp_path):
    backbone = opened(tiny_sd_folder)
    copied = shutil.copytree(tiny_sd_folder, tmp_path / "copy")
    assert opened(copied).vae_fingerprint == backbone.vae_fingerprint
    assert opened(copied).text_fingerprint == backbone.text_fingerprint
    assert opened(copied, precision="bf16").text_fingerprint != backbone.text_fingerprint
    changed = backbone.plain_pipeline()
    with torch.no_grad():
        changed.vae.encoder.conv_in.bias[0] += 1e-3
        changed.text_encoder.final_layer_norm.bias[0] += 1e-3
    changed.save_pretrained(tmp_path / "changed")
    other = opened(tmp_path / "changed")
    assert other.vae_fingerprint != backbone.vae_fingerprint
    assert other.text_fingerprint != backbone.text_fingerprint


def test_digests_do_not_change_with_use_or_adapters(tiny_sd_folder):
    fresh, used = opened(tiny_sd_folder), opened(tiny_sd_folder)
    used.encode_text(["a cat"])
    used.components["text_encoder"].add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert used.text_fingerprint == fresh.text_fingerprint


def test_the_pipeline_shares_the_live_modules(backbone):
    pipeline = backbone.pipeline()
    assert pipeline.unet is backbone.components["unet"]
    assert pipeline.text_encoder is backbone.components["text_encoder"]
    assert backbone.plain_pipeline().unet is not backbone.components["unet"]


def test_auto_precision_is_native_half_precision_or_float32():
    chosen = choose_dtype("auto", torch.device("cpu"))
    assert chosen == (torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32)
    assert choose_dtype("fp16", torch.device("cpu")) == torch.float16
    assert choose_dtype("auto", torch.device("meta")) == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own deprecated parts
def test_compiling_gives_the_same_gradients_and_keeps_layer_names(tiny_sd_folder, monkeypatch):
    # The graph is traced and differentiated as always, but no C++ is built from it, which takes minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain, compiled = opened(tiny_sd_folder), opened(tiny_sd_folder, compile=True)
    expected, actual = (gradients(b, with_adapter(b)) for b in (plain, compiled))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # float32 sums in another order
    names = [[name for name, _ in b.components["unet"].named_modules()] for b in (plain, compiled)]
    assert names[0] == names[1]
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 100
