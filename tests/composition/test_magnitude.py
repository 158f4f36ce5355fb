import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.composition.magnitude import magnitude
from mmpeft.composition.sum import weighted_sum
from mmpeft.delta import Dense


@given(st.integers(0, 20), st.sampled_from([0.1, 0.5, 0.9]), st.floats(-2, 2))
def test_the_largest_entries_of_each_are_added_unscaled(seed, density, weight):
    changes = np.random.default_rng(seed).normal(size=(2, 30)).astype(np.float32)
    expected = np.zeros(30)
    for change, factor in zip(changes, (1.0, weight), strict=True):
        kept = np.argsort(-np.abs(change))[: int(density * 30)]
        expected[kept] += factor * change[kept]
    one, other = (Dense(torch.from_numpy(change.reshape(2, 15))) for change in changes)
    result = magnitude([(one, 1.0), (other, weight)], density=density).dense().numpy().ravel()
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_density_one_is_the_sum(low_rank):
    terms = [(low_rank((3, 2, 3, 3), 2, 0), 0.8), (low_rank((3, 2, 3, 3), 1, 1), -0.4)]
    torch.testing.assert_close(magnitude(terms, density=1.0).dense(), weighted_sum(terms).dense())
