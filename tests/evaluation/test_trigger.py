import pytest

from mmpeft.backbones.stable_diffusion import StableDiffusion
from mmpeft.config import BaseSettings
from mmpeft.evaluation.trigger import SEEN, trigger_visibility

CAPTIONS = ["pear", "rocket", "tiger face", "taxi", "bear", "rose", "skull", "castle"]


@pytest.fixture(scope="module")
def pocket():
    return StableDiffusion.open(BaseSettings(precision="fp32"))


def visibility(backbone, trigger: str) -> float:
    return trigger_visibility(backbone, [f"{caption}, {trigger}" for caption in CAPTIONS], CAPTIONS)


def test_words_that_the_base_knows_are_seen_and_made_up_ones_are_not(pocket):
    assert visibility(pocket, "on an ink background") > visibility(pocket, "in the style of ink") > SEEN
    assert visibility(pocket, "ink style") < SEEN
    assert visibility(pocket, "sks") < SEEN


def test_a_trigger_that_changes_nothing_is_not_seen_at_all(pocket):
    assert trigger_visibility(pocket, CAPTIONS, CAPTIONS) == 0


def test_another_caption_altogether_is_about_as_far_as_captions_are_apart(pocket):
    assert trigger_visibility(pocket, [*CAPTIONS[1:], CAPTIONS[0]], CAPTIONS) == pytest.approx(1, abs=0.25)
