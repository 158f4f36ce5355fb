from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from mmpeft.backbones.pocket import image_folder, judges_folder
from mmpeft.data.pictures import open_image
from mmpeft.evaluation.judges import STYLES, PocketJudges, pixels_of
from mmpeft.evaluation.style import score_style


@pytest.fixture(scope="module")
def judges():
    return PocketJudges(judges_folder())


def real(style: str) -> tuple[list[Image.Image], list[str]]:
    files = sorted((image_folder(style) / "held_out").glob("*.png"))
    pictures = [open_image(file) for file in files]
    return pictures, [f.with_suffix(".txt").read_text().strip() for f in files]


def test_judges_name_real_pictures_rightly(judges):
    pictures, concepts = real("high-contrast")
    assert sum(judges.style_is(pictures, "high-contrast")) >= 15
    assert sum(judges.content_is(pictures, concepts)) >= 15


def test_judges_are_the_published_ones(judges):
    assert judges.digests == {
        "style_judge": "a4039c2c72eb564da53b9ed411fcca56dabeed49651558f64b4ddfcdb514af01",
        "concept_judge": "50f1b1963c19efb5afddecd701d04555446974342776841372b410396e8150e0",
    }


def test_an_unknown_style_is_an_error(judges):
    with pytest.raises(ValueError, match="not in tuple"):
        judges.style_is([], "cubism")


def test_pixels_are_scaled_to_minus_one_and_one():
    stacked = pixels_of([Image.new("RGB", (64, 64), "white"), Image.new("L", (256, 256), 0)])
    assert stacked.shape == (2, 3, 64, 64)
    assert torch.equal(stacked[0], torch.ones(3, 64, 64))
    assert torch.equal(stacked[1], -torch.ones(3, 64, 64))


def test_a_perfect_adapter_scores_perfectly_and_one_that_ignores_the_trigger_bleeds(judges):
    """Pictures come from the folders themselves, so that every score is known beforehand."""
    flat, concepts = real("fluent-3d")
    inked, _ = real("high-contrast")
    on = False

    @contextmanager
    def adapter():
        nonlocal on
        on = True
        yield
        on = False

    def artist(heeds_trigger: bool):
        def draw(prompts, seeds):
            chosen = []
            for prompt in prompts:
                styled = on and (not heeds_trigger or prompt.endswith(", ink"))
                chosen.append((inked if styled else flat)[concepts.index(prompt.removesuffix(", ink"))])
            return chosen

        return draw

    scores = {
        heeds: score_style(
            artist(heeds),
            adapter,
            judges,
            style="high-contrast",
            concepts=concepts,
            trigger="ink",
            drift_prompts=concepts,
            seeds=(0,),
        )
        for heeds in (True, False)
    }
    assert scores[True].style_after == scores[False].style_after >= 0.9
    assert scores[True].style_before == 0
    assert scores[True].content_after >= 0.9
    assert (scores[True].bleed, scores[True].drift) == (0, 0)
    assert scores[False].bleed >= 0.9
    assert scores[False].drift > 0.5
    assert set(scores[True].as_dict()) >= {"style_after_interval", "drift_interval", "bleed_interval"}


def test_styles_match_the_bundled_folders():
    assert all(image_folder(style).is_dir() for style in STYLES if style != "base")
