import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmpeft.data.buckets import Bucket, choose_bucket, crop_offset, is_flipped, make_buckets
from mmpeft.errors import ConfigError

PLANS = st.tuples(st.integers(1, 600), st.sampled_from([1, 8, 16, 32, 64]), st.floats(1, 5)).filter(
    lambda plan: plan[0] // plan[1] in range(1, 41)
)
SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@pytest.mark.parametrize(
    ("resolution", "multiple", "max_aspect", "expected"),
    [
        (64, 16, 2, "48x80 64x64 80x48"),
        (512, 64, 2, "384x640 448x576 512x512 576x448 640x384"),
        (512, 64, 1, "512x512"),
        (64, 64, 4, "64x64"),
        (63, 32, 3, "32x96 32x64 32x32 64x32 96x32"),
    ],
)
def test_known_lists(resolution, multiple, max_aspect, expected):
    assert " ".join(map(str, make_buckets(resolution, multiple, max_aspect))) == expected


@given(PLANS)
def test_buckets_keep_their_bounds_and_come_in_pairs(plan):
    resolution, multiple, max_aspect = plan
    buckets = make_buckets(*plan)
    side = resolution // multiple * multiple
    assert Bucket(side, side) in buckets
    assert len(set(buckets)) == len(buckets)
    aspects = [width / height for width, height in buckets]
    assert aspects == sorted(aspects)
    for width, height in buckets:
        assert width % multiple == height % multiple == 0
        assert width * height <= resolution**2
        assert max(width, height) / min(width, height) <= max_aspect
        assert (height, width) in buckets
        # One side is as long as the area allows beside the other; only the rounded square may be shorter.
        grown = max((width + multiple) * height, width * (height + multiple))
        assert grown > resolution**2 or width == height


@given(PLANS)
def test_every_size_within_the_bounds_is_a_bucket_or_fits_in_one(plan):
    resolution, multiple, max_aspect = plan
    assume(resolution // multiple <= 12)
    buckets = make_buckets(*plan)
    sides = range(multiple, resolution * 5, multiple)
    for width in sides:
        for height in (side for side in sides if width * side <= resolution**2):
            if max(width, height) <= max_aspect * min(width, height):
                assert any(bucket.width >= width and bucket.height >= height for bucket in buckets)


@given(PLANS, SIZES)
def test_nearest_shape_is_chosen(plan, size):
    buckets = make_buckets(*plan)
    chosen = choose_bucket(size, buckets)

    def distance(bucket):
        return abs(math.log(size[0] / size[1]) - math.log(bucket.width / bucket.height))

    # 1e-12: the reference is in floating point, the rule is exact.
    assert distance(chosen) <= min(map(distance, buckets)) + 1e-12


@given(PLANS, SIZES)
def test_turned_image_takes_the_turned_bucket(plan, size):
    buckets = make_buckets(*plan)
    width, height = choose_bucket(size, buckets)
    assert choose_bucket((size[1], size[0]), buckets) == (height, width)


@given(PLANS, SIZES, st.integers(2, 7))
def test_only_the_shape_of_an_image_counts(plan, size, factor):
    buckets = make_buckets(*plan)
    assert choose_bucket(size, buckets) == choose_bucket((size[0] * factor, size[1] * factor), buckets)


def test_ties_go_to_the_larger_bucket():
    assert choose_bucket((10, 10), [Bucket(32, 32), Bucket(64, 64), Bucket(48, 48)]) == (64, 64)
    # 2:1 lies half way between 1:1 and 4:1 on the logarithmic scale.
    assert choose_bucket((20, 10), [Bucket(64, 64), Bucket(120, 30)]) == (64, 64)
    assert choose_bucket((20, 10), [Bucket(64, 64), Bucket(160, 40)]) == (160, 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 16), "resolution: this base needs at least 16.*got 8"),
        ((64, 0), "multiple of at least 1; got 0"),
        ((64, 16, 0.5), "max_aspect: must be at least 1.*got 0.5"),
    ],
)
def test_impossible_plans_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_buckets(*arguments)


def test_crop_is_drawn_anew_at_each_visit_over_the_whole_range():
    draws = [crop_offset(0, epoch, index) for epoch in range(20) for index in range(50)]
    assert len(set(draws)) == 1000
    for values in zip(*draws, strict=True):
        assert 0 <= min(values) < 0.02
        assert 0.98 < max(values) < 1
    assert crop_offset(0, 3, 4) == draws[3 * 50 + 4]
    assert crop_offset(1, 3, 4) != draws[3 * 50 + 4]


def test_half_of_the_visits_are_flipped():
    draws = [is_flipped(0, epoch, index) for epoch in range(40) for index in range(50)]
    # Five standard deviations of 2000 coin tosses.
    assert abs(sum(draws) / 2000 - 0.5) < 0.056
    assert draws[:50] == [is_flipped(0, 0, index) for index in range(50)]
    assert draws[:50] != draws[50:100]
