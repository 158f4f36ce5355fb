import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.composition.slerp import slerp
from mmpeft.delta import Dense, LowRank
from mmpeft.errors import MethodError


def shoemake(one, other, t):
    """The textbook's formula on vectors, with the lengths interpolated."""
    lengths = np.linalg.norm(one), np.linalg.norm(other)
    one, other = one / lengths[0], other / lengths[1]
    angle = np.arccos(np.clip(one @ other, -1, 1))
    direction = (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)
    return ((1 - t) * lengths[0] + t * lengths[1]) * direction


@given(st.floats(0.05, 2), st.floats(0.05, 2), st.booleans(), st.integers(0, 10))
def test_two_changes_meet_at_the_textbooks_point(low_rank, weight, other_weight, is_turned, seed):
    one, other = low_rank((4, 3, 3, 3), 2, seed), low_rank((4, 3, 3, 3), 3, seed + 100)
    sign = -1 if is_turned else 1
    result = slerp([(one, weight), (other, sign * other_weight)])
    vectors = one.dense().double().numpy().ravel(), sign * other.dense().double().numpy().ravel()
    expected = shoemake(*vectors, other_weight / (weight + other_weight))
    np.testing.assert_allclose(result.dense().numpy().ravel(), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(result, LowRank)
    assert result.rank == 5


def test_the_mean_of_many_is_where_their_pulls_cancel(low_rank):
    weights = (1.0, 0.5, 0.25, 0.75)
    vectors = torch.stack([low_rank((5, 6), 2, seed).dense().flatten().double() for seed in range(4)])
    result = slerp([(low_rank((5, 6), 2, seed), weight) for seed, weight in enumerate(weights)])
    mean = result.dense().flatten().double()
    assert float(mean.norm()) == pytest.approx(
        sum(w * float(v.norm()) for w, v in zip(weights, vectors, strict=True)) / sum(weights), rel=1e-5
    )
    mean, units = mean / mean.norm(), vectors / vectors.norm(dim=1, keepdim=True)
    cosines = units @ mean
    pulls = (cosines.acos() / cosines.acos().sin())[:, None] * (units - cosines[:, None] * mean)
    assert float((torch.tensor(weights, dtype=torch.float64) @ pulls).norm()) < 1e-5


def test_only_the_ratio_of_weights_counts_and_a_lone_change_keeps_its_weight(low_rank):
    one, other = low_rank((4, 3), 2, 0), low_rank((4, 3), 2, 1)
    torch.testing.assert_close(
        slerp([(one, 1.0), (other, 3.0)]).dense(), slerp([(one, 0.25), (other, 0.75)]).dense()
    )
    torch.testing.assert_close(slerp([(one, 0.3)]).dense(), 0.3 * one.dense())


def test_the_same_change_twice_is_itself(low_rank):
    one = low_rank((4, 3), 2, 0)
    torch.testing.assert_close(slerp([(one, 1.0), (one, 0.5)]).dense(), one.dense())


def test_opposite_changes_have_no_direction_between(low_rank):
    one = low_rank((4, 3), 2, 0)
    for weights in ((1.0, -1.0), (1.0, -0.3)):
        with pytest.raises(MethodError, match="point away from each other"):
            slerp([(one, weights[0]), (one, weights[1])])


def test_a_change_without_a_direction_only_shortens(low_rank):
    one, nothing = low_rank((4, 3), 2, 0), Dense(torch.zeros(4, 3))
    torch.testing.assert_close(slerp([(one, 3.0), (nothing, 1.0)]).dense(), 0.75 * one.dense())
