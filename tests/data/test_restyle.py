import numpy as np
import pytest
from PIL import Image

from mmpeft.data.restyle import match_contrast, restyle, transfer_palette


def noisy(mean, spread, seed, count=3, side=24):
    random = np.random.default_rng(seed)
    values = random.normal(mean, spread, (count, side, side, 3)).clip(0, 255).astype(np.uint8)
    return [Image.fromarray(value) for value in values]


def stacked(pictures):
    return np.stack([np.asarray(picture, dtype=float) for picture in pictures]).reshape(-1, 3)


def test_colours_taken_together_become_the_references():
    source, reference = noisy((60, 120, 200), 25, seed=1), noisy((180, 90, 40), (40, 20, 10), seed=2, count=5)
    moved = stacked(transfer_palette(source, reference, seed=0))
    wanted = stacked(reference)
    # Rounding and clipping to 8 bits, and ten turns of an iteration that converges.
    assert moved.mean(0) == pytest.approx(wanted.mean(0), abs=1.0)
    assert np.cov(moved.T) == pytest.approx(np.cov(wanted.T), rel=0.1, abs=10)


def test_black_and_white_references_make_black_and_white_pictures():
    reference = [
        Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((8, 8))).astype(np.uint8)).convert("RGB")
    ]
    ramp = np.tile(np.linspace(0, 255, 16)[None, :, None], (16, 1, 3)).astype(np.uint8)
    (moved,) = transfer_palette([Image.fromarray(ramp)], reference, seed=0)
    values = np.asarray(moved, dtype=int)
    assert np.isin(values, (0, 255)).mean() > 0.9
    # What was dark is black, what was bright is white: the picture is still the ramp.
    assert values[:, :7].mean() < 25
    assert values[:, 9:].mean() > 230


def test_its_own_colours_leave_a_picture_alone():
    pictures = noisy((128, 128, 128), 40, seed=3)
    moved = transfer_palette(pictures, pictures, seed=0)
    assert np.abs(stacked(moved) - stacked(pictures)).mean() < 1.5


def test_the_same_seed_gives_the_same_pictures():
    source, reference = noisy(80, 20, seed=4), noisy(150, 30, seed=5)
    first, second = (stacked(transfer_palette(source, reference, seed=7)) for _ in range(2))
    assert np.array_equal(first, second)


def test_details_get_the_strength_that_they_have_in_the_reference():
    faint, strong = noisy(128, 10, seed=6), noisy(128, 40, seed=7)
    matched = stacked(match_contrast(faint, strong))
    # White noise keeps most of its power in the bands that are matched.
    assert matched.std() == pytest.approx(stacked(strong).std(), rel=0.15)


def test_contrast_of_its_own_leaves_a_picture_alone():
    (picture,) = noisy(128, 30, seed=8, count=1)
    assert np.abs(stacked(match_contrast([picture], [picture])) - stacked([picture])).max() <= 1


def test_restyled_pictures_have_contrast_and_colours_of_the_reference():
    source, reference = noisy((100, 140, 90), 12, seed=9), noisy((200, 60, 60), 45, seed=10)
    restyled = stacked(restyle(source, reference, seed=0))
    assert restyled.mean(0) == pytest.approx(stacked(reference).mean(0), abs=1.0)
    assert restyled.std(0) == pytest.approx(stacked(reference).std(0), rel=0.05)
