import tomllib
from pathlib import Path

import pytest

from mmpeft.config import Recipe
from mmpeft.errors import ConfigError
from mmpeft.trainers import presets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("preset", presets.names())
@pytest.mark.parametrize("base", ["pocket", "stable-diffusion-v1-5/stable-diffusion-v1-5"])
def test_every_preset_builds_a_recipe_on_every_base(preset, base, photos):
    recipe = presets.resolve(photos, preset=preset, overrides={"base": base})
    assert recipe.base.name == base
    assert recipe.objective.prior.pictures


@pytest.mark.parametrize("preset", presets.names())
def test_every_preset_opens_with_its_command(preset):
    text = (ROOT / "trainers" / "recipes" / f"{preset}.toml").read_text()
    assert text.startswith("#")
    assert f"--preset {preset}" in text.split("\n[")[0]


def test_a_preset_differs_by_base_and_what_is_said_wins(photos):
    pocket = presets.resolve(photos, preset="style")
    other = presets.resolve(photos, preset="style", overrides={"base": "some/model", "train.steps": 7})
    assert pocket.train.learning_rate > other.train.learning_rate
    assert other.train.steps == 7
    assert not other.objective.prior.prompts


def test_a_recipe_file_may_name_its_preset(tmp_path):
    file = tmp_path / "ink.toml"
    file.write_text('preset = "style"\nbase = "pocket"\n[train]\nsteps = 9\n')
    recipe = presets.resolve(file)
    assert recipe.train.steps == 9
    assert recipe.objective.prior.pictures
    assert recipe.out == Path("runs/ink")


def test_a_recipe_comes_back_from_itself(photos, tmp_path):
    recipe = presets.resolve(photos, preset="style")
    again = presets.resolve(recipe, out=tmp_path)
    assert isinstance(again, Recipe)
    assert again.model_copy(update={"out": recipe.out}) == recipe


def test_held_out_concepts_are_in_no_preset():
    from mmpeft.backbones.pocket import image_folder

    held_out = {f.read_text().strip() for f in (image_folder("high-contrast") / "held_out").glob("*.txt")}
    prompts = tomllib.loads((ROOT / "trainers/recipes/style.toml").read_text())["for"]["pocket"]["objective"][
        "prior"
    ]
    assert len(held_out) == 16
    assert not held_out & set(prompts["prompts"])


@pytest.mark.parametrize(
    ("source", "settings", "sentence"),
    [
        ("nowhere", {}, "there is no folder or recipe nowhere"),
        ("photos", {"preset": "stile"}, "no preset is called 'stile'; did you mean 'style'?"),
        ("notes.txt", {}, r"notes\.txt is a file; give a folder of images or a recipe that ends in \.toml"),
    ],
)
def test_what_cannot_be_found_is_said(source, settings, sentence, photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    Path("notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=sentence):
        presets.resolve(source, **settings)
