import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.delta import Dense, Gain, LowRank, Sum, add, inner, matrix_shape, principal_angles, truncate
from mmpeft.errors import ConfigError, MethodError

SHAPES = [(4, 3), (2, 3, 3, 3), (5, 2, 1, 1), (6,), (3, 40)]


def low_rank(shape, rank, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = matrix_shape(shape)
    B, A = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return LowRank(B.to(dtype), A.to(dtype), shape)


def decaying(rows, columns, rank, seed=0, last=1e-3):
    delta = low_rank((rows, columns), rank, seed)
    return LowRank(delta.lora_B * torch.logspace(0, math.log10(last), rank), delta.lora_A, delta.shape)


def optimal_error(delta, rank):
    """Eckart and Young's error from the dense matrix's singular values, float64."""
    S = torch.linalg.svdvals(exact(delta))
    return float((S[rank:].square().sum() / S.square().sum()).sqrt())


def exact(delta):
    if isinstance(delta, LowRank):
        return delta.lora_B.double() @ delta.lora_A.double()
    return delta.dense().double().reshape(matrix_shape(delta.shape))


def true_error(result, delta):
    return float((exact(result) - exact(delta)).norm() / exact(delta).norm())


def angles_between(one, other):
    """numpy's angles of the column spaces by the definition: cosines of orthonormal bases."""
    (one, _), (other, _) = np.linalg.qr(one), np.linalg.qr(other)
    return np.arccos(np.clip(np.linalg.svd(one.T @ other, compute_uv=False), -1, 1))


@given(
    st.sampled_from(SHAPES), st.lists(st.tuples(st.integers(1, 4), st.floats(-3, 3)), min_size=1, max_size=4)
)
def test_adding_low_rank_changes_is_exact(shape, parts):
    deltas = [low_rank(shape, rank, seed).scaled(weight) for seed, (rank, weight) in enumerate(parts)]
    total = add(deltas)
    assert isinstance(total, LowRank)
    assert total.rank == sum(rank for rank, _ in parts)
    expected = torch.stack([delta.dense() for delta in deltas]).sum(0)
    torch.testing.assert_close(
        total.dense(), expected, rtol=1e-4, atol=1e-4
    )  # float32 sums of at most 16 terms
    assert total.dense().shape == shape


@given(st.sampled_from(SHAPES), st.integers(1, 4), st.floats(0.1, 10))
def test_the_norm_is_that_of_the_dense_change_whatever_the_gauge(shape, rank, factor):
    delta = low_rank(shape, rank, 7)
    assert delta.norm() == pytest.approx(float(delta.dense().double().norm()), rel=1e-5)
    other = LowRank(delta.lora_B / factor, delta.lora_A * factor, shape)
    assert other.norm() == pytest.approx(delta.norm(), rel=1e-5)
    assert Dense(delta.dense()).norm() == pytest.approx(delta.norm(), rel=1e-5)


@given(st.sampled_from(SHAPES), st.integers(1, 4), st.integers(1, 4))
def test_the_inner_product_is_that_of_the_dense_changes(shape, rank, other_rank):
    one, other = low_rank(shape, rank, 1), low_rank(shape, other_rank, 2)
    expected = pytest.approx(float((exact(one) * exact(other)).sum()), rel=1e-4, abs=1e-4)
    assert inner(one, other) == expected
    assert inner(one, Dense(other.dense())) == expected
    assert inner(other, one) == expected


def test_changes_of_different_kinds_add_up_to_a_sum_that_is_never_nested():
    one, other = low_rank((4, 3), 2, 1), Dense(torch.ones(4, 3))
    total = add([add([one, other.scaled(-2.0)]), add([other, one])])
    assert isinstance(total, Sum)
    assert [type(part) for part in total.parts] == [LowRank, Dense]
    torch.testing.assert_close(total.dense(), 2 * one.dense() - 1)
    torch.testing.assert_close(total.scaled(-3.0).dense(), 3 - 6 * one.dense())
    assert total.norm() == pytest.approx(float(total.dense().norm()), rel=1e-5)


def test_a_gain_multiplies_outputs_or_input_channels():
    weight = torch.randn(3, 2, 3, 3, dtype=torch.bfloat16)
    outputs, inputs = torch.tensor([0.5, 0.0, -1.0]), torch.tensor([2.0, -0.25])
    by_output, by_input = Gain(outputs, "output", weight), Gain(inputs, "input", weight)
    torch.testing.assert_close(by_output.dense(), weight.float() * outputs[:, None, None, None])
    torch.testing.assert_close(by_input.dense(), weight.float() * inputs[None, :, None, None])
    torch.testing.assert_close(by_input.scaled(-2.0).dense(), -2 * by_input.dense())
    assert by_output.shape == (3, 2, 3, 3)
    assert by_output.norm() == pytest.approx(float(by_output.dense().norm()), rel=1e-5)
    vector = Gain(torch.tensor([1.0, 2.0]), "output", torch.tensor([3.0, 4.0]))
    assert vector.dense().tolist() == [3.0, 8.0]


def test_gains_of_one_weight_and_side_merge_and_others_stay_apart():
    weight, twin = torch.randn(3, 3), torch.randn(3, 3)
    gain = torch.tensor([1.0, -0.5, 0.0])
    merged = add([Gain(gain, "output", weight), Gain(gain, "output", weight.detach())])
    assert isinstance(merged, Gain)
    torch.testing.assert_close(merged.gain, 2 * gain)
    apart = add([Gain(gain, "output", weight), Gain(gain, "input", weight), Gain(gain, "output", twin)])
    assert isinstance(apart, Sum)
    assert len(apart.parts) == 3
    expected = gain[:, None] * weight + weight * gain + gain[:, None] * twin
    torch.testing.assert_close(apart.dense(), expected)


def test_a_gain_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"gain \(2,\) is not one per output of \(3, 2\)"):
        Gain(torch.ones(2), "output", torch.ones(3, 2))
    with pytest.raises(ValueError, match="is not one per input"):
        Gain(torch.ones(3), "input", torch.ones(3))


def test_half_precision_comes_in_and_float32_is_computed():
    delta = low_rank((4, 3), 2, 1, torch.bfloat16)
    assert delta.lora_A.dtype == delta.dense().dtype == torch.float32
    assert Dense(torch.ones(2, 2, dtype=torch.float16)).dense().dtype == torch.float32


def test_a_flattened_shape_gives_way_to_the_weights_own():
    own, flat = low_rank((2, 3, 3, 3), 1, 0), low_rank((2, 27), 2, 1)
    for total in (add([own, flat]), add([flat, Dense(own.dense())])):
        assert total.shape == total.dense().shape == (2, 3, 3, 3)
        torch.testing.assert_close(total.dense().reshape(2, 27), own.dense().reshape(2, 27) + flat.dense())
    assert inner(own, flat) == pytest.approx(float((exact(own) * exact(flat)).sum()), rel=1e-4)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="must have one shape"):
        add([low_rank((4, 3), 1, 0), low_rank((2, 3, 3, 3), 1, 0)])
    with pytest.raises(ValueError, match="must have one shape"):
        add([low_rank((2, 9, 1, 1), 1, 0), low_rank((2, 1, 3, 3), 1, 0)])
    with pytest.raises(ValueError, match="nothing to add"):
        add([])
    with pytest.raises(ValueError, match=r"factors \(4, 2\) and \(2, 3\) do not make a weight \(4, 4\)"):
        LowRank(torch.ones(4, 2), torch.ones(2, 3), (4, 4))


def test_weight_zero_is_nothing():
    assert low_rank((4, 3), 2, 0).scaled(0.0).norm() == 0.0


@given(
    st.sampled_from([(4, 3), (3, 40), (2, 3, 3, 3), (12, 9), (6,)]),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 16),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_truncation_is_the_best_there_is_and_tells_its_true_error(shape, ranks, rank, dtype):
    delta = add([low_rank(shape, r, seed, dtype).scaled(1 - seed) for seed, r in enumerate(ranks)])
    result, error = truncate(delta, rank=rank)
    best = optimal_error(delta, rank)
    assert result.rank <= rank
    assert result.shape == shape
    assert error == pytest.approx(best, rel=1e-6, abs=2e-7)  # what float32 cannot resolve is dropped
    assert true_error(result, delta) == pytest.approx(best, rel=1e-6, abs=5e-7)  # the factors are float32
    by_matrix, matrix_error = truncate(Dense(delta.dense()), rank=rank)
    assert matrix_error == pytest.approx(best, rel=1e-4, abs=1e-5)  # float32 decomposition
    assert true_error(by_matrix, delta) == pytest.approx(best, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 8, 15])
def test_the_error_is_optimal_over_three_decades_of_singular_values(rank):
    delta = decaying(60, 90, 16)
    result, error = truncate(delta, rank=rank)
    assert error == pytest.approx(optimal_error(delta, rank), rel=1e-6)
    assert true_error(result, delta) == pytest.approx(error, rel=1e-5)


def test_truncation_of_nearly_equal_adapters_keeps_the_digits_of_their_difference():
    one = low_rank((50, 40), 4, 0)
    moved = LowRank(one.lora_B + 1e-4 * low_rank((50, 40), 4, 1).lora_B, one.lora_A, one.shape)
    difference = add([one, moved.scaled(-1.0)])
    result, error = truncate(difference, rank=4)
    assert error < 1e-6
    assert true_error(result, difference) < 1e-6
    assert truncate(difference)[0].rank == 4


def test_dependent_factors_shrink_to_their_rank_and_zero_to_rank_one():
    one = low_rank((8, 5, 3, 3), 3, 0)
    result, error = truncate(add([one, one, one.scaled(-0.5)]))
    assert result.rank == 3
    assert error < 1e-6
    torch.testing.assert_close(result.dense(), 1.5 * one.dense(), rtol=1e-5, atol=1e-5)
    for nothing in (one.scaled(0.0), Dense(torch.zeros(8, 5, 3, 3))):
        result, error = truncate(nothing, rank=4)
        assert (result.rank, error, result.norm()) == (1, 0.0, 0.0)


def test_singular_values_are_split_evenly():
    result, _ = truncate(decaying(20, 30, 6), rank=4)
    torch.testing.assert_close(result.lora_B.norm(dim=0), result.lora_A.norm(dim=1))
    gram = result.lora_B.T @ result.lora_B
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-5 * float(gram.max()))


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_rank_is_the_smallest_that_keeps_error_or_energy(error, energy):
    delta = decaying(30, 20, 8, last=0.05)
    errors = [optimal_error(delta, rank) for rank in range(9)]
    by_error, given_error = truncate(delta, error=error)
    assert given_error <= error + 1e-6
    assert by_error.rank == 1 or errors[by_error.rank - 1] > error - 1e-6
    by_energy, given_error = truncate(delta, energy=energy)
    assert 1 - given_error**2 >= energy - 1e-6
    assert by_energy.rank == 1 or 1 - errors[by_energy.rank - 1] ** 2 < energy + 1e-6
    both, _ = truncate(delta, error=error, energy=energy)
    assert both.rank == max(by_error.rank, by_energy.rank)
    assert truncate(delta, rank=2, error=error, energy=energy)[0].rank == min(2, both.rank)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: must be a whole number of at least 1; got 0"),
        ({"error": -0.1}, "error: must be a share between 0 and 1; got -0.1"),
        ({"error": float("nan")}, "error: must be a share between 0 and 1; got nan"),
        ({"energy": 1.5}, "energy: must be a share between 0 and 1; got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        truncate(low_rank((4, 3), 2, 0), **settings)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_no_numbers_are_refused(bad):
    delta = low_rank((4, 3), 2, 0)
    A, B = delta.lora_A.clone(), delta.lora_B.clone()
    A[0, 0] = B[0, 0] = bad
    broken = [LowRank(B, delta.lora_A, (4, 3)), LowRank(delta.lora_B, A, (4, 3)), Dense(B)]
    for each in broken:
        with pytest.raises(MethodError, match="entries that are not finite numbers"):
            truncate(each, rank=1)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_principal_angles_are_those_of_the_dense_spaces(rank, other_rank, seed):
    one, other = low_rank((12, 10), rank, seed), low_rank((12, 10), other_rank, seed + 10)
    for side, of in (("output", lambda d: d.lora_B), ("input", lambda d: d.lora_A.T)):
        angles = principal_angles(one, other, side)
        expected = angles_between(of(one).double().numpy(), of(other).double().numpy())
        np.testing.assert_allclose(angles.numpy(), expected, atol=1e-7)
        np.testing.assert_allclose(principal_angles(other, one, side).numpy(), expected, atol=1e-7)


def test_angles_are_zero_to_itself_and_right_to_what_it_never_touches():
    one = low_rank((6, 8), 2, 0)
    same = LowRank(one.lora_B.flip(1) * 3, one.lora_A.flip(0), one.shape)
    assert principal_angles(one, same).max() < 1e-7
    apart = LowRank(torch.eye(6)[:, :2], one.lora_A, one.shape)
    other = LowRank(torch.eye(6)[:, 2:4], one.lora_A, one.shape)
    np.testing.assert_allclose(principal_angles(apart, other).numpy(), math.pi / 2, atol=1e-12)
    assert principal_angles(apart, other, "input").max() < 1e-7


def test_small_angles_keep_their_digits_and_only_the_numerical_rank_counts():
    tilted = torch.tensor([[1.0, 0.0], [1e-6, 0.0], [0.0, 0.0]])
    straight = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    one, other = LowRank(tilted, torch.eye(2), (3, 2)), LowRank(straight, torch.ones(2, 2), (3, 2))
    angles = principal_angles(one, other)
    assert angles.shape == (1,)
    assert float(angles) == pytest.approx(1e-6, rel=1e-6)
    assert principal_angles(one, other.scaled(0.0)).shape == (0,)
