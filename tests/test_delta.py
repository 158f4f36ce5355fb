import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.delta import Dense, LowRank, Sum, add

SHAPES = [(4, 3), (2, 3, 3, 3), (5, 2, 1, 1)]


def low_rank(shape, rank, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    columns = int(torch.tensor(shape[1:]).prod())
    B, A = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return LowRank(B.to(dtype), A.to(dtype), shape)


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


def test_changes_of_different_kinds_add_up_to_a_sum_that_is_never_nested():
    one, other = low_rank((4, 3), 2, 1), Dense(torch.ones(4, 3))
    total = add([add([one, other.scaled(-2.0)]), add([other, one])])
    assert isinstance(total, Sum)
    assert [type(part) for part in total.parts] == [LowRank, Dense]
    torch.testing.assert_close(total.dense(), 2 * one.dense() - 1)
    torch.testing.assert_close(total.scaled(-3.0).dense(), 3 - 6 * one.dense())


def test_half_precision_comes_in_and_float32_is_computed():
    delta = low_rank((4, 3), 2, 1, torch.bfloat16)
    assert delta.lora_A.dtype == delta.dense().dtype == torch.float32
    assert Dense(torch.ones(2, 2, dtype=torch.float16)).dense().dtype == torch.float32


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="must have one shape"):
        add([low_rank((4, 3), 1, 0), low_rank((2, 3, 3, 3), 1, 0)])
    with pytest.raises(ValueError, match="nothing to add"):
        add([])


def test_weight_zero_is_nothing():
    assert low_rank((4, 3), 2, 0).scaled(0.0).norm() == 0.0
