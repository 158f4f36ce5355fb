from pathlib import Path

import pytest

from mmpeft.config import Recipe, merge, nested, read_toml
from mmpeft.errors import ConfigError

MINIMAL = {"out": "run", "data.images": "photos"}


def test_dotted_and_nested_settings_mean_the_same():
    assert nested({"train.steps": 5, "train": {"batch_size": 2}}) == {"train": {"steps": 5, "batch_size": 2}}


def test_later_layers_win_and_leave_the_rest():
    recipe = Recipe.build(MINIMAL, {"train": {"steps": 5, "batch_size": 2}}, {"train.steps": 7})
    assert (recipe.train.steps, recipe.train.batch_size) == (7, 2)


def test_base_may_be_said_by_its_name_alone():
    assert Recipe.build(MINIMAL, {"base": "some/model"}).base.name == "some/model"


def test_a_preview_may_be_a_prompt_alone():
    recipe = Recipe.build(MINIMAL, {"preview.prompts": ["a cat", {"prompt": "a dog", "seed": 3}]})
    assert [(each.prompt, each.seed) for each in recipe.preview.prompts] == [("a cat", 0), ("a dog", 3)]


def test_another_method_does_not_inherit_the_settings_of_the_one_below():
    below = {"method": {"name": "lora", "rank": 4, "rslora": True}}
    merge(below, {"method": {"name": "dora"}})
    assert below == {"method": {"name": "dora"}}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            {"train.lerning_rate": 1e-4},
            "train.lerning_rate: there is no such setting; did you mean 'learning_rate'?",
        ),
        ({"method.rnak": 4}, "method.rnak: there is no such setting; did you mean 'rank'?"),
        ({"method.rank": 0}, "method.rank: .* greater than or equal to 1; got 0"),
        ({"method.name": "lroa"}, "no method is called 'lroa'; did you mean 'lora'?"),
        ({"trian": {}}, "trian: there is no such setting; did you mean 'train'?"),
        ({"train.learning_rate": float("nan")}, "train.learning_rate: .*; got nan"),
        ({"base.attention": "fsat"}, "base.attention: .*'sdpa'.*; got 'fsat'"),
        ({"components.unet.learning_rat": 1}, "components.unet.learning_rat: there is no such setting"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_given(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Recipe.build(MINIMAL, wrong)


def test_a_recipe_without_a_run_folder_says_so():
    with pytest.raises(ConfigError, match="out: must be given"):
        Recipe.build({"data.images": "photos"})


def test_recipe_is_frozen():
    recipe = Recipe.build(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3


def test_dotted_recipe_builds_the_same_recipe_again():
    recipe = Recipe.build(
        MINIMAL, {"train.steps": 7, "method.rank": 3, "components.text_encoder.stop_after": 0.5}
    )
    assert Recipe.build(recipe.dotted()) == recipe


def test_missing_and_broken_recipe_files_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there is no recipe file .*nowhere\.toml"):
        read_toml(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        read_toml(broken)
