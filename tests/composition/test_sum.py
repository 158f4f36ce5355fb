import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.composition.sum import weighted_sum


@given(
    st.sampled_from([(4, 3), (3, 2, 3, 3), (6,)]),
    st.lists(st.tuples(st.integers(1, 4), st.floats(-3, 3)), min_size=1, max_size=4),
)
def test_the_sum_is_that_of_the_matrices_and_ranks_add_up(low_rank, shape, parts):
    terms = [(low_rank(shape, rank, seed), weight) for seed, (rank, weight) in enumerate(parts)]
    result = weighted_sum(terms)
    expected = sum(weight * delta.dense() for delta, weight in terms)
    torch.testing.assert_close(result.dense(), expected, rtol=1e-5, atol=1e-4)  # sums of at most 16 terms
    assert result.rank == sum(rank for rank, _ in parts)


@given(st.integers(1, 4))
def test_an_adapter_at_weight_zero_is_nothing(low_rank, rank):
    one, other = low_rank((4, 3), 2, 0), low_rank((4, 3), rank, 1)
    torch.testing.assert_close(
        weighted_sum([(one, 0.7), (other, 0.0)]).dense(), weighted_sum([(one, 0.7)]).dense()
    )
