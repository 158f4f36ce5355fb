import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.composition.sum import weighted_sum
from mmpeft.composition.svd import truncated_sum
from mmpeft.errors import ConfigError


@given(st.sampled_from([(9, 7), (4, 3, 3, 3), (6,)]), st.integers(1, 8), st.floats(-2, 2).filter(bool))
def test_no_matrix_of_that_rank_is_closer_to_the_sum(low_rank, shape, rank, weight):
    terms = [(low_rank(shape, 3, 0), 1.0), (low_rank(shape, 2, 1), weight)]
    result = truncated_sum(terms, rank=rank)
    whole = weighted_sum(terms)
    matrix = whole.lora_B.double() @ whole.lora_A.double()
    S = torch.linalg.svdvals(matrix)
    missed = float((result.lora_B.double() @ result.lora_A.double() - matrix).norm())
    best = float(S[rank:].norm())
    assert result.rank <= rank
    assert missed == pytest.approx(best, rel=1e-6, abs=1e-6 * float(S[0]))  # factors rounded to float32


def test_a_single_adapter_shrinks_by_rank_error_or_energy(low_rank):
    alone = [(low_rank((20, 30), 8, 0), 0.5)]
    norm = weighted_sum(alone).norm()

    def missed(result):
        return float((result.dense() - 0.5 * alone[0][0].dense()).norm()) / norm

    assert truncated_sum(alone).rank == 8
    assert truncated_sum(alone, rank=3).rank == 3
    by_error = truncated_sum(alone, error=0.5)
    assert by_error.rank < 8
    assert missed(by_error) <= 0.5 < missed(truncated_sum(alone, rank=by_error.rank - 1))
    by_energy = truncated_sum(alone, energy=0.75)
    assert by_energy.rank == by_error.rank  # keeping 0.75 of the energy is missing half of the norm


def test_a_rank_below_one_is_refused(low_rank):
    with pytest.raises(ConfigError, match="rank: must be a whole number of at least 1; got 0"):
        truncated_sum([(low_rank((4, 3), 1, 0), 1.0)], rank=0)
