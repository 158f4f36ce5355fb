"""The drop-in Stable Diffusion pipeline on a tiny model: its mix is the call's, for each prompt, in each thread."""

import threading

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import mmpeft
from mmpeft.errors import BankError, ConfigError
from mmpeft.mix import Mask, Mix, Schedule, Weight
from mmpeft.pipelines import MmpeftStableDiffusionPipeline

PROMPTS = ["a red cat", "a dog in ink"]
# float32 through some steps of a tiny model, batched differently
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def adapters(tiny_sd_epsilon_folder, attach_randomly):
    def load():
        return StableDiffusionPipeline.from_pretrained(tiny_sd_epsilon_folder)

    everywhere = ("*attn*.to_*", "*.conv1", "*.time_emb_proj", "conv_in", "*.proj_in", "*.ff.net.2")
    return {
        "a": attach_randomly(load(), "lora", 1, rank=3, alpha=1.0, unet=everywhere),
        "b": attach_randomly(load(), "lora", 2, rank=2, alpha=2.0),
    }


@pytest.fixture(scope="module")
def opened(tiny_sd_epsilon_folder, adapters):
    return loaded(MmpeftStableDiffusionPipeline.from_pretrained(tiny_sd_epsilon_folder), adapters)


@pytest.fixture
def pipe(opened):
    yield opened
    if opened.bank.is_fused:
        opened.bank.unfuse()
    opened.bank.mix({})


def loaded(pipe, adapters):
    pipe.set_progress_bar_config(disable=True)
    for name, adapter in adapters.items():
        pipe.bank.load(adapter, name)
    return pipe


def draw(pipe, prompts=PROMPTS, seeds=None, steps=2, **settings):
    """Give the latents, (B, C, h, w); the pictures' seeds count up."""
    count = settings.get("num_images_per_prompt", 1) * (1 if isinstance(prompts, str) else len(prompts))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(count)]
    return pipe(
        prompts, num_inference_steps=steps, generator=generators, output_type="latent", **settings
    ).images


def differ(first, second):
    return bool((first - second).norm() > 1e-2 * first.norm())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": ["ink", "dog"], "num_images_per_prompt": 2},
        {"guidance_rescale": 0.5, "eta": 0.5},
    ],
)
def test_without_adapters_it_draws_what_stock_diffusers_draws(settings, pipe, tiny_sd_epsilon_folder):
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd_epsilon_folder)
    stock.set_progress_bar_config(disable=True)
    expected = draw(stock, **settings)
    assert torch.equal(draw(pipe, **settings), expected)
    assert torch.equal(draw(pipe, adapters={}, **settings), expected)
    bare = MmpeftStableDiffusionPipeline.from_pretrained(tiny_sd_epsilon_folder)
    bare.set_progress_bar_config(disable=True)
    assert torch.equal(draw(bare, **settings), expected)


def test_a_call_carries_its_mix_and_leaves_the_banks(pipe):
    pipe.bank.mix(b=0.4)
    own = draw(pipe)
    called = draw(pipe, adapters={"a": 0.8})
    assert pipe.bank.weights == {"a": 0.0, "b": 0.4}
    assert torch.equal(draw(pipe), own)
    assert differ(called, own)
    pipe.bank.mix(a=0.8)
    assert torch.equal(draw(pipe), called)
    assert torch.equal(draw(pipe, adapters=Mix.of(a=0.8)), called)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"negative_prompt": ["ink", "a dog"]},
    ],
)
@pytest.mark.parametrize(
    "mixes",
    [
        [{"a": 0.9}, {"b": -0.7}],
        [{}, {"a": 0.5, "b": 0.5}],
        [
            {"a": Weight(0.9, schedule=Schedule.window(0, 0.5), conditional_only=True)},
            {"a": Weight(-0.5, schedule=Schedule.window(0, 0.5), conditional_only=True), "b": 1.0},
        ],
    ],
)
def test_a_mixed_batch_is_each_prompt_alone(mixes, settings, pipe):
    count = settings.get("num_images_per_prompt", 1)
    together = draw(pipe, adapters=mixes, **settings)
    for number, (prompt, mix) in enumerate(zip(PROMPTS, mixes, strict=True)):
        alone = dict(settings)
        if "negative_prompt" in settings:
            alone["negative_prompt"] = [settings["negative_prompt"][number]]
        rows = range(number * count, (number + 1) * count)
        expected = draw(pipe, [prompt], seeds=list(rows), adapters=mix, **alone)
        torch.testing.assert_close(together[list(rows)], expected, **CLOSE)
        if mix:
            assert differ(expected, draw(pipe, [prompt], seeds=list(rows), adapters={}, **alone))


def test_given_embeddings_count_as_prompts(pipe):
    with torch.no_grad(), pipe.bank.using({}):
        embeds, negative = pipe.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    mixes = [{"a": 0.9}, {"b": 0.7}]
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    together = pipe(
        num_inference_steps=3, generator=generators, output_type="latent", adapters=mixes, **given
    ).images
    for number, mix in enumerate(mixes):
        alone = pipe(
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(number),
            output_type="latent",
            adapters=mix,
            **{name: tensor[number : number + 1] for name, tensor in given.items()},
        ).images
        torch.testing.assert_close(together[number : number + 1], alone, **CLOSE)


def test_an_adapter_of_the_conditional_branch_alone_leaves_the_negative_prompt(pipe):
    device = torch.device("cpu")
    with pipe.bank.using({}):
        positive, negative = pipe.encode_prompt(PROMPTS, device, 1, True, ["ink", "red"])
    with pipe.bank.using(a=Weight(conditional_only=True)):
        changed, kept = pipe.encode_prompt(PROMPTS, device, 1, True, ["ink", "red"])
    assert torch.equal(kept, negative)
    assert differ(changed, positive)
    everywhere = draw(pipe, adapters={"a": 1.0})
    assert differ(draw(pipe, adapters={"a": Weight(conditional_only=True)}), everywhere)
    unguided = {"guidance_scale": 1.0}
    torch.testing.assert_close(
        draw(pipe, adapters={"a": Weight(conditional_only=True)}, **unguided),
        draw(pipe, adapters={"a": 1.0}, **unguided),
        **CLOSE,
    )


def test_two_threads_on_one_pipeline_each_get_their_own_picture(pipe):
    mixes = [{"a": 0.9}, {"b": -0.7}, {"a": Weight(schedule=Schedule.window(0, 0.4))}, None]
    expected = [draw(pipe, adapters=mix, guidance_scale=2.0 + n) for n, mix in enumerate(mixes)]
    found = {}

    def work(number):
        for _ in range(2):
            found[number] = draw(pipe, adapters=mixes[number], guidance_scale=2.0 + number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(mixes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, picture in enumerate(expected):
        assert torch.equal(found[number], picture)


def test_a_window_over_the_time_counts_in_its_steps_alone(pipe):
    base, full = draw(pipe, adapters={}), draw(pipe, adapters={"a": 1.0})
    unet_only = {"a": Weight(blocks=(("text_encoder", 0.0),))}
    latents = {}

    def keep(name):
        def note(pipeline, step, timestep, values):
            latents.setdefault(name, []).append(values["latents"].clone())
            return {}

        return note

    late = {"a": Weight(blocks=(("text_encoder", 0.0),), schedule=Schedule.window(0.5, 1.0))}
    for name, mix in (("base", {}), ("late", late), ("all", unet_only)):
        draw(pipe, steps=4, adapters=mix, callback_on_step_end=keep(name))
    same = [bool(torch.equal(a, b)) for a, b in zip(latents["base"], latents["late"], strict=True)]
    times = [1 - float(t) / 999 for t in pipe.scheduler.timesteps]
    assert same == [time < 0.5 for time in times]
    assert differ(latents["base"][0], latents["all"][0])
    assert differ(base, full)


@pytest.mark.parametrize(
    ("wrong", "error", "reason"),
    [
        ([{"a": 1.0}], ConfigError, "one mix for each prompt; got 1 mixes and 2 prompts"),
        ({"a": Weight(samples=(1.0, 0.0, 1.0))}, BankError, "there are 2 prompts and 3 weights"),
        ({"c": 1.0}, BankError, "no adapter called 'c'"),
        ("a", ConfigError, "a mix is adapter names with their weights; got 'a'"),
    ],
)
def test_adapters_that_cannot_be_are_refused_and_nothing_changes(wrong, error, reason, pipe):
    pipe.bank.mix(b=0.5)
    before = draw(pipe)
    with pytest.raises(error, match=reason):
        draw(pipe, adapters=wrong)
    assert pipe.bank.weights == {"a": 0.0, "b": 0.5}
    assert torch.equal(draw(pipe), before)


def test_it_is_made_from_another_pipeline_and_shares_a_bank(pipe, adapters, tiny_sd_epsilon_folder):
    stock = StableDiffusionPipeline.from_pretrained(tiny_sd_epsilon_folder)
    made = loaded(MmpeftStableDiffusionPipeline.from_pipe(stock), adapters)
    assert made.unet is stock.unet
    assert torch.equal(draw(made, adapters={"a": 0.5}), draw(pipe, adapters={"a": 0.5}))
    again = MmpeftStableDiffusionPipeline.from_pipe(made)
    assert again.bank is made.bank
    unasked = MmpeftStableDiffusionPipeline.from_pretrained(tiny_sd_epsilon_folder)
    sharing = MmpeftStableDiffusionPipeline.from_pipe(unasked)
    assert sharing.bank is unasked.bank
    unasked.bank.detach()
    assert unasked.bank.is_attached
    other = MmpeftStableDiffusionPipeline.from_pipe(
        made, unet=StableDiffusionPipeline.from_pretrained(tiny_sd_epsilon_folder).unet
    )
    with pytest.raises(BankError, match="has a bank already"):
        _ = other.bank


def test_what_it_saves_loads_in_plain_diffusers(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(plain) is StableDiffusionPipeline
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(draw(plain), draw(pipe, adapters={}))
    assert type(MmpeftStableDiffusionPipeline.from_pretrained(tmp_path)) is MmpeftStableDiffusionPipeline


def test_half_a_mask_changes_mostly_its_half(pipe):
    """The rest leaks through convolutions, and norms and self-attention over the whole picture."""
    mask = torch.zeros(16, 16)
    mask[:8] = 1
    weight = {"blocks": (("text_encoder", 0.0),)}
    base = draw(pipe, adapters={}, height=64, width=64)
    full = draw(pipe, adapters={"a": Weight(**weight)}, height=64, width=64)
    upper = draw(pipe, adapters={"a": Weight(mask=Mask(mask), **weight)}, height=64, width=64)
    lower = draw(pipe, adapters={"a": Weight(mask=Mask(1 - mask), **weight)}, height=64, width=64)
    for changed, inside in ((upper, slice(0, 8)), (lower, slice(8, 16))):
        energy = (changed - base).square()
        share = float(energy[:, :, inside].sum() / energy.sum())
        assert share > 0.7
    assert differ(full, upper)
    ones = draw(pipe, adapters={"a": Weight(mask=Mask(torch.ones(4, 4)), **weight)}, height=64, width=64)
    assert torch.equal(ones, full)
    zeros = draw(pipe, adapters={"a": Weight(mask=Mask(torch.zeros(4, 4)))}, height=64, width=64)
    assert torch.equal(zeros, base)


def test_a_fused_mix_refuses_a_call_with_another(pipe):
    pipe.bank.mix(a=0.5)
    live = draw(pipe)
    pipe.bank.fuse()
    with pytest.raises(BankError, match="fused"):
        draw(pipe, adapters={"b": 1.0})
    torch.testing.assert_close(draw(pipe), live, **CLOSE)


def test_it_serves_as_a_custom_pipeline(tiny_sd_epsilon_folder, monkeypatch, tmp_path):
    import diffusers.utils.dynamic_modules_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path))
    file = mmpeft.pipelines.stable_diffusion.__file__
    pipe = DiffusionPipeline.from_pretrained(
        tiny_sd_epsilon_folder, custom_pipeline=file, trust_remote_code=True
    )
    assert type(pipe).__name__ == "MmpeftStableDiffusionPipeline"
    assert pipe.bank.adapters == {}
