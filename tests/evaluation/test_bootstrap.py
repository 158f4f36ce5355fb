import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.evaluation.bootstrap import interval

numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=40)


@given(numbers)
def test_interval_lies_within_the_values(values):
    low, high = interval(values)
    assert min(values) - 1e-3 <= low <= high <= max(values) + 1e-3


def test_interval_agrees_with_the_normal_approximation_for_many_samples():
    values = np.random.default_rng(1).normal(3, 2, 2000)
    low, high = interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    # 2,000 resamples place a quantile within about a tenth of the half width.
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_samples_of_one_group_count_as_one():
    hits = [1, 1, 1, 1, 0, 0, 0, 0] * 4
    alone, together = interval(hits), interval(hits, groups=[place // 4 for place in range(32)])
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])


def test_a_share_without_spread_is_bounded_by_the_rule_of_three():
    assert interval([True] * 64) == (pytest.approx(1 - 3 / 64, abs=1e-3), 1.0)
    assert interval([False] * 64) == (0.0, pytest.approx(3 / 64, abs=1e-3))


def test_the_same_values_give_the_same_interval():
    assert interval([0.1, 0.5, 0.9]) == interval([0.1, 0.5, 0.9])
