"""What the quickstart does around its trainings; `make quickstart` runs those."""

import pytest

from mmpeft.errors import ConfigError
from mmpeft.evaluation.judges import STYLES
from mmpeft.trainers import quickstart
from mmpeft.trainers.preparation import prior_settings


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "style").mkdir()
    (tmp_path / "style" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else; give the quickstart a folder of its own"):
        quickstart.quickstart(tmp_path)
    assert (tmp_path / "style" / "mine.txt").read_text() == "mine"


def test_a_folder_of_its_own_may_be_written_anew(tmp_path):
    out = tmp_path / "runs" / "quickstart"
    quickstart.claim(out)
    (out / "report.json").write_text("{}")
    quickstart.claim(out)


@pytest.mark.parametrize("run", [quickstart.STYLE, quickstart.SECOND])
def test_its_recipes_are_recipes_and_never_saw_the_held_out_captions(run):
    held_out = set(quickstart.captions(run.images, "held_out"))
    assert held_out
    assert not held_out & set(quickstart.captions(run.images, "train"))
    assert not held_out & set(prior_settings(run.recipe()).prompts)


def test_the_style_that_is_scored_is_one_that_the_judge_knows():
    assert quickstart.STYLE.images in STYLES
