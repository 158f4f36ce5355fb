import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.composition.sum import weighted_sum
from mmpeft.composition.ties import ties
from mmpeft.delta import Dense


def reference(changes, weights, density, normalize=True):
    """TIES of flat numpy vectors as the paper's algorithm 1 reads, on weighted changes."""
    trimmed = []
    for change, weight in zip(changes, weights, strict=True):
        order = np.argsort(-np.abs(change), kind="stable")
        kept = np.zeros_like(change)
        kept[order[: int(density * change.size)]] = change[order[: int(density * change.size)]]
        trimmed.append(weight * kept)
    result = np.zeros_like(changes[0])
    for entry in range(result.size):
        values = [change[entry] for change in trimmed]
        positive, negative = sum(v for v in values if v > 0), -sum(v for v in values if v < 0)
        agreeing = [v for v in values if (v > 0 if positive > negative else v < 0)]
        if agreeing:
            result[entry] = sum(agreeing) / (len(agreeing) if normalize else 1)
    return result


@given(
    st.integers(0, 20),
    st.lists(st.sampled_from([1.0, 0.8, 0.25, -0.6, -1.5]), min_size=1, max_size=4),
    st.sampled_from([0.1, 0.5, 0.75, 1.0]),
    st.booleans(),
)
def test_ties_is_what_the_paper_says(seed, weights, density, normalize):
    changes = np.random.default_rng(seed).normal(size=(len(weights), 24)).astype(np.float32)
    terms = [(Dense(torch.from_numpy(c.reshape(4, 6))), w) for c, w in zip(changes, weights, strict=True)]
    result = ties(terms, density=density, normalize=normalize).dense().numpy().ravel()
    expected = reference(changes.astype(np.float64), weights, density, normalize)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_values_worked_out_by_hand():
    one = Dense(torch.tensor([[3.0, -1.0, 0.5, 2.0]]))
    other = Dense(torch.tensor([[-2.0, -3.0, 1.0, 0.1]]))
    whole = ties([(one, 1.0), (other, 1.0)], density=1.0)
    assert whole.dense().tolist() == [[3.0, -2.0, 0.75, pytest.approx(1.05)]]
    half = ties([(one, 1.0), (other, 1.0)], density=0.5)
    assert half.dense().tolist() == [[3.0, -3.0, 0.0, 2.0]]


def test_signs_are_elected_on_weighted_changes():
    strong, weak = Dense(torch.tensor([[-2.0]])), Dense(torch.tensor([[3.0]]))
    # unweighted, 3 would outvote -2 and give +0.3
    assert ties([(weak, 0.1), (strong, 1.0)], density=1.0).dense().item() == -2.0
    assert ties([(weak, -1.0), (strong, 1.0)], density=1.0).dense().item() == -2.5


def test_an_entry_whose_mass_cancels_is_zero():
    one = Dense(torch.tensor([[1.0, 2.0]]))
    assert ties([(one, 1.0), (one, -1.0)], density=1.0).dense().tolist() == [[0.0, 0.0]]


def test_the_sum_of_what_agrees_is_the_plain_sum_where_nothing_conflicts(low_rank):
    one = Dense(low_rank((4, 3), 2, 0).dense().abs())
    other = Dense(low_rank((4, 3), 2, 1).dense().abs())
    terms = [(one, 0.8), (other, 0.6)]
    result = ties(terms, density=1.0, normalize=False)
    torch.testing.assert_close(result.dense(), weighted_sum(terms).dense())
    torch.testing.assert_close(ties(terms, density=1.0).dense(), weighted_sum(terms).dense() / 2)


@given(st.sampled_from([2.0, -1.0, -0.5]))
def test_the_strength_follows_the_weights_whatever_their_sign(low_rank, factor):
    terms = [(low_rank((4, 3), 2, seed), weight) for seed, weight in enumerate([1.0, -0.75, 0.5])]
    scaled = [(delta, factor * weight) for delta, weight in terms]
    torch.testing.assert_close(ties(scaled).dense(), factor * ties(terms).dense())


def test_entries_of_equal_size_are_kept_together():
    same = Dense(torch.ones(2, 3))
    assert ties([(same, 0.5)], density=0.2).dense().tolist() == [[0.5] * 3] * 2


def test_at_least_one_entry_stays():
    assert ties([(Dense(torch.tensor([1.0, -4.0, 2.0])), 1.0)], density=0.01).dense().tolist() == [
        0.0,
        -4.0,
        0.0,
    ]
