import numpy as np
import pytest
from PIL import Image

from mmpeft.evaluation.drift import drift


def plain(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, level, level))


def test_unchanged_pictures_have_no_drift():
    base = [plain(level) for level in (0, 100, 200)]
    assert drift(base, base) == (0.0, (0.0, 0.0))


def test_pictures_moved_as_far_as_another_prompt_have_drift_one():
    assert drift([plain(100), plain(0)], [plain(0), plain(100)]) == (1.0, (1.0, 1.0))


def test_drift_is_the_mean_distance_in_units_of_the_distance_between_prompts():
    base = [plain(0), plain(100)]
    measured, (low, high) = drift([plain(50), plain(100)], base)
    assert measured == 0.25
    assert low == 0.0
    assert high == pytest.approx(0.5)


def test_drift_does_not_depend_on_the_pictures_size():
    random = np.random.default_rng(0)
    small = [Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(6)]
    large = [image.resize((8, 8), Image.Resampling.NEAREST) for image in small]
    assert drift(small[:3], small[3:])[0] == pytest.approx(drift(large[:3], large[3:])[0], abs=1e-4)
