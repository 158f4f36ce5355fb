import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.composition.knots import knots
from mmpeft.composition.sum import weighted_sum
from mmpeft.delta import LowRank, matrix_shape


def dense_knots(terms, density, normalize):
    """The paper's definition on the concatenated matrices: SVD, TIES of the V blocks, back."""
    matrices = [delta.dense().double().reshape(matrix_shape(delta.shape)).numpy() for delta, _ in terms]
    U, S, V = np.linalg.svd(np.concatenate(matrices, 1), full_matrices=False)
    rank = np.count_nonzero(S / S[0] > 1e-6)
    blocks = np.split(V[:rank], len(terms), axis=1)
    trimmed = []
    for block, (_, weight) in zip(blocks, terms, strict=True):
        smallest = np.sort(np.abs(block).ravel())[-max(1, int(density * block.size))]
        trimmed.append(np.where(np.abs(block) >= smallest, weight * block, 0))
    sign = np.sign(np.sum(trimmed, 0))
    agreeing = [np.where(np.sign(block) == sign, block, 0) for block in trimmed]
    count = np.maximum(1, sum((block != 0).astype(int) for block in agreeing)) if normalize else 1
    return (U[:, :rank] * S[:rank]) @ (np.sum(agreeing, 0) / count)


@given(
    st.sampled_from([(9, 8), (5, 3, 3, 3), (4, 30)]),
    st.lists(st.sampled_from([1.0, 0.7, -0.5]), min_size=1, max_size=3),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 20),
)
def test_knots_on_factors_is_knots_on_matrices(low_rank, shape, weights, density, normalize, seed):
    terms = [(low_rank(shape, 1 + i, 10 * seed + i), weight) for i, weight in enumerate(weights)]
    result = knots(terms, density=density, normalize=normalize)
    assert isinstance(result, LowRank)
    assert result.rank <= sum(range(1, len(weights) + 1))
    expected = dense_knots(terms, density, normalize)
    np.testing.assert_allclose(
        result.dense().numpy().reshape(expected.shape), expected, atol=2e-4 * np.abs(expected).max()
    )


def test_no_matrix_is_built_of_low_rank_changes(low_rank, monkeypatch):
    def dense(self):
        raise AssertionError("built the dense matrix")

    monkeypatch.setattr(LowRank, "dense", dense)
    assert knots([(low_rank((40, 30), 2, seed), 1.0) for seed in range(3)]).rank == 6


def test_changes_with_outputs_of_their_own_do_not_conflict():
    # the first writes outputs 0 and 1, the other 2 and 3: nothing of one is in the other's way
    one = LowRank(torch.eye(4)[:, :2] * torch.tensor([3.0, 2.0]), torch.ones(2, 5), (4, 5))
    other = LowRank(torch.eye(4)[:, 2:] * torch.tensor([5.0, 1.0]), -torch.ones(2, 5), (4, 5))
    terms = [(one, 0.8), (other, 0.5)]
    result = knots(terms, density=1.0)
    torch.testing.assert_close(result.dense(), weighted_sum(terms).dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [0.5, -2.0])
def test_a_lone_change_at_density_one_is_itself(low_rank, weight):
    delta = low_rank((5, 3, 3, 3), 3, 0)
    result = knots([(delta, weight)], density=1.0)
    torch.testing.assert_close(result.dense(), weight * delta.dense(), rtol=1e-5, atol=1e-5)
