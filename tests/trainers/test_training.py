"""Whole runs on a tiny Stable Diffusion: from a folder of images to the adapter that stock diffusers loads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file

import mmpeft
from mmpeft.errors import ConfigError, DataError

TRIGGER = "red ink"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six captioned pictures, one of them wide, so that there are two buckets and a short last batch."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(6):
        size = (64, 32) if number == 5 else (48, 48)
        colour = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {'cat' if number % 2 else 'dog'}")
    return folder


def run(photos: Path, base: Path, out: Path, resume: bool = False, **settings):
    given = {
        "data.trigger": TRIGGER,
        "train.steps": 4,
        "train.batch_size": 2,
        "train.learning_rate": 0.05,
        "base.precision": "fp32",
        "method.rank": 2,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    return mmpeft.train(photos, base=str(base), out=out, overrides=given, resume=resume)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_run_leaves_an_adapter_that_stock_diffusers_was_seen_to_load(photos, tiny_sd_folder, tmp_path):
    result = run(photos, tiny_sd_folder, tmp_path / "run")
    assert result.verified
    assert result.steps == 4
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat, red ink", num_inference_steps=2, generator=generator, output_type="np").images

    before = draw()
    pipe.load_lora_weights(result.adapter_dir)
    assert np.abs(draw() - before).max() > 1e-3


def test_an_adapter_with_text_encoder_conv_dora_and_other_alpha_verifies_too(
    photos, tiny_sd_epsilon_folder, tmp_path
):
    result = run(
        photos,
        tiny_sd_epsilon_folder,
        tmp_path / "run",
        method__name="dora",
        method__targets=["all"],
        method__alpha=5.0,
        components={
            "unet": {},
            "text_encoder": {"learning_rate": 0.01, "stop_after": 0.5, "targets": ["attention"]},
        },
    )
    assert result.verified
    adapter = mmpeft.load_adapter(result.adapter_dir)
    assert adapter.components == ("text_encoder", "unet")


def test_the_moving_average_is_what_is_saved_and_verified(photos, tiny_sd_folder, tmp_path):
    averaged = run(photos, tiny_sd_folder, tmp_path / "averaged", train__ema=0.9)
    last = run(photos, tiny_sd_folder, tmp_path / "last")
    assert averaged.verified
    one, other = (mmpeft.load_adapter(each.adapter_dir) for each in (averaged, last))
    assert any(not torch.equal(one[layer].dense(), other[layer].dense()) for layer in one.layers)


def test_two_runs_of_one_recipe_give_the_same_bytes_and_another_seed_does_not(
    photos, tiny_sd_folder, tmp_path
):
    one = run(photos, tiny_sd_folder, tmp_path / "one", data__caption_dropout=0.3, method__dropout=0.1)
    two = run(photos, tiny_sd_folder, tmp_path / "two", data__caption_dropout=0.3, method__dropout=0.1)
    other = run(
        photos, tiny_sd_folder, tmp_path / "other", data__caption_dropout=0.3, method__dropout=0.1, seed=1
    )
    assert files(one.adapter_dir) == files(two.adapter_dir)
    name = "pytorch_lora_weights.safetensors"
    assert files(one.adapter_dir)[name] != files(other.adapter_dir)[name]


def test_a_run_that_grows_goes_on_from_its_checkpoint(photos, tiny_sd_folder, tmp_path):
    whole = run(photos, tiny_sd_folder, tmp_path / "whole", train__steps=6)
    run(photos, tiny_sd_folder, tmp_path / "grown", train__steps=3)
    grown = run(photos, tiny_sd_folder, tmp_path / "grown", train__steps=6, resume=True)
    weights = [load_file(each.adapter_dir / "pytorch_lora_weights.safetensors") for each in (whole, grown)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_cached_and_fresh_latents_train_alike(photos, tiny_sd_folder, tmp_path):
    cold = run(photos, tiny_sd_folder, tmp_path / "cold", cache=str(tmp_path / "cache"))
    warm = run(photos, tiny_sd_folder, tmp_path / "warm", cache=str(tmp_path / "cache"))
    assert files(cold.adapter_dir) == files(warm.adapter_dir)


def test_a_batch_of_four_equals_two_accumulated_twice(photos, tiny_sd_folder, tmp_path):
    four = run(photos, tiny_sd_folder, tmp_path / "four", train__batch_size=4)
    two = run(photos, tiny_sd_folder, tmp_path / "two", train__batch_size=2, train__accumulate=2)
    one, other = (mmpeft.load_adapter(each.adapter_dir) for each in (four, two))
    for layer in one.layers:
        # float32 sums in another order, through four Adam steps.
        torch.testing.assert_close(one[layer].dense(), other[layer].dense(), rtol=1e-3, atol=1e-5)


def test_training_can_start_from_an_adapter(photos, tiny_sd_folder, tmp_path):
    first = run(photos, tiny_sd_folder, tmp_path / "first")
    second = run(
        photos,
        tiny_sd_folder,
        tmp_path / "second",
        init_from=str(first.adapter_dir),
        train__learning_rate=1e-9,
    )
    one, other = mmpeft.load_adapter(first.adapter_dir), mmpeft.load_adapter(second.adapter_dir)
    for layer in one.layers:
        torch.testing.assert_close(one[layer].dense(), other[layer].dense(), rtol=1e-4, atol=1e-6)


def test_the_artefact_says_nothing_about_the_users_machine(photos, tiny_sd_folder, tmp_path):
    result = run(photos, tiny_sd_folder, tmp_path / "run", data__caption="a secret caption")
    words = [
        b"secret",
        str(tmp_path).encode(),
        str(photos).encode(),
        str(tiny_sd_folder.parent).encode(),
        b"0.png",
    ]
    for name, content in files(result.adapter_dir).items():
        assert not [word for word in words if word in content], name


def test_the_card_says_what_is_needed_to_know(photos, tiny_sd_folder, tmp_path):
    result = run(photos, tiny_sd_folder, tmp_path / "run")
    card = json.loads((result.adapter_dir / "adapter.json").read_text())
    assert card["trigger"] == TRIGGER
    assert card["steps"] == 4
    assert card["seed"] == 0
    assert card["base"] == tiny_sd_folder.name
    assert len(card["data_digest"]) == 32
    assert card["recipe"]["method.rank"] == 2
    assert set(card["versions"]) >= {"torch", "diffusers", "peft", "mmpeft"}
    assert card["fingerprint"]["layers"]


def test_previews_and_validation_are_kept(photos, tiny_sd_folder, tmp_path):
    result = run(
        photos,
        tiny_sd_folder,
        tmp_path / "run",
        validation__images=str(photos),
        validation__every=2,
        preview__every=2,
        preview__steps=2,
        preview__prompts=[
            {"prompt": "a cat, red ink", "seed": 3},
            {"prompt": "a dog", "width": 64, "height": 32},
        ],
    )
    previews = tmp_path / "run" / "previews"
    assert sorted(path.name for path in previews.iterdir()) == ["step-000000", "step-000002", "step-000004"]
    with Image.open(previews / "step-000004" / "1.png") as picture:
        assert picture.size == (64, 32)
    assert result.metrics["best_step"] in (2, 4)
    assert (tmp_path / "run" / "best" / "pytorch_lora_weights.safetensors").exists()


def test_stock_diffusers_reproduces_the_cards_preview(photos, tiny_sd_folder, tmp_path):
    result = run(
        photos,
        tiny_sd_folder,
        tmp_path / "run",
        preview__steps=3,
        preview__prompts=[{"prompt": "a cat", "seed": 5}],
    )
    card = json.loads((result.adapter_dir / "adapter.json").read_text())
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(result.adapter_dir)
    said = card["preview"]
    picture = pipe(
        said["prompt"],
        negative_prompt=said["negative_prompt"],
        num_inference_steps=said["steps"],
        guidance_scale=said["guidance"],
        generator=torch.Generator().manual_seed(said["seed"]),
    ).images[0]
    with Image.open(result.adapter_dir / "preview.png") as file:
        shown = np.asarray(file, dtype=int)
    assert np.abs(np.asarray(picture, dtype=int) - shown).max() <= 1


def test_random_crop_trains_without_a_latent_cache(photos, tiny_sd_folder, tmp_path):
    run(photos, tiny_sd_folder, tmp_path / "run", data__crop="random", cache=str(tmp_path / "cache"))
    entries = [load_file(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert entries
    assert not [entry for entry in entries if "mean" in entry]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method__targets": ["no_such_layer"]}, "no_such_layer"),
        (
            {"components": {"tower": {}}},
            r"components\.tower: this base has no such component; it has text_encoder, unet",
        ),
        ({"data__images": "nowhere"}, "the image folder nowhere does not exist"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused_before_time_is_spent(
    photos, tiny_sd_folder, tmp_path, settings, sentence
):
    with pytest.raises(mmpeft.MmpeftError, match=sentence):
        run(photos, tiny_sd_folder, tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_that_holds_a_run_is_not_trained_over(photos, tiny_sd_folder, tmp_path):
    result = run(photos, tiny_sd_folder, tmp_path / "run")
    before = files(result.adapter_dir)
    with pytest.raises(
        ConfigError, match="holds a run; add --resume to go on with it, or choose another --out"
    ):
        run(photos, tiny_sd_folder, tmp_path / "run")
    assert files(result.adapter_dir) == before


def test_an_unreadable_image_stops_the_run_by_name(photos, tiny_sd_folder, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for file in photos.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "torn.png").write_bytes((photos / "0.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"torn\.png"):
        run(folder, tiny_sd_folder, tmp_path / "run")


PRIOR = {
    "objective": {
        "prior": {
            "pictures": 4,
            "prompts": ["ink", "a red dog"],
            "share": 0.5,
            "restyled": 2,
            "restyled_timesteps": (200, 999),
        }
    }
}


def test_a_prior_is_drawn_kept_and_restyled(photos, tiny_sd_folder, tmp_path):
    result = run(photos, tiny_sd_folder, tmp_path / "run", **PRIOR)
    assert result.verified
    drawn = tmp_path / "run" / "restyled"
    # The folder's two captions, then the prompts, without the trigger.
    assert sorted(f.read_text().strip() for f in drawn.glob("*.txt")) == [
        "a cat",
        "a dog",
        "a red dog",
        "ink",
    ]
    assert len(list(drawn.glob("*.png"))) == 4


def test_two_processes_train_what_one_trains(photos, tiny_sd_folder, tmp_path):
    recipe = {
        "data": {"images": str(photos), "trigger": TRIGGER},
        "base": {"name": str(tiny_sd_folder), "precision": "fp32"},
        "method": {"rank": 2},
        "train": {"steps": 4, "batch_size": 4, "learning_rate": 0.01},
        **PRIOR,
    }
    one = mmpeft.train(recipe, out=tmp_path / "one")
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    command = ["train", tmp_path / "recipe.toml", "--out", tmp_path / "two", "--processes", "2"]
    command += ["--train.batch_size", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "mmpeft.cli", *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    alone, shared = (
        mmpeft.load_adapter(folder) for folder in (one.adapter_dir, tmp_path / "two" / "adapter")
    )
    for layer in alone.layers:
        # float32 sums in another order, through four Adam steps.
        torch.testing.assert_close(alone[layer].dense(), shared[layer].dense(), rtol=1e-3, atol=1e-5)


def test_a_trigger_that_the_text_encoder_does_not_see_is_said(photos, tmp_path, capsys):
    run(photos, "pocket", tmp_path / "run", data__trigger="sks", train__steps=1, base__precision="auto")
    assert "the text encoder hardly sees 'sks'" in capsys.readouterr().out


def test_a_rank_pattern_that_names_nothing_is_an_error(photos, tiny_sd_folder, tmp_path):
    with pytest.raises(mmpeft.MmpeftError, match=r"'up_blocks\.9' names no layer that learns"):
        run(photos, tiny_sd_folder, tmp_path / "run", method__rank_pattern={"up_blocks.9": 3})


def test_a_run_that_learns_nothing_is_not_called_verified_and_keeps_what_it_made(
    photos, tiny_sd_folder, tmp_path
):
    result = run(
        photos, tiny_sd_folder, tmp_path / "run", train__learning_rate=1e-30, train__weight_decay=0.0
    )
    assert not result.verified
    assert "it has learned nothing, or was not saved" in result.text()
    assert (result.adapter_dir / "pytorch_lora_weights.safetensors").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_the_command_line_exits_with_an_error_when_the_adapter_is_not_verified(
    photos, tiny_sd_folder, tmp_path
):
    command = ["train", photos, "--base", tiny_sd_folder, "--out", tmp_path / "run", "--steps", "1"]
    command += ["--train.learning_rate", "1e-30", "--train.batch_size", "2", "--train.weight_decay", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "mmpeft.cli", *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "not verified" in done.stdout


def test_random_crop_says_that_it_goes_without_a_latent_cache(photos, tiny_sd_folder, tmp_path, capsys):
    run(photos, tiny_sd_folder, tmp_path / "run", data__crop="random", train__steps=1)
    assert "random crop is drawn anew at each visit: latents are not cached" in capsys.readouterr().out
