import pytest
import torch

from mmpeft.composition.dare import dare, dare_ties
from mmpeft.composition.entries import merge_agreeing
from mmpeft.composition.sum import weighted_sum


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_seed_draws_the_same_and_another_seed_other_entries(low_rank):
    terms = [(low_rank((8, 9), 3, 0), 1.0), (low_rank((8, 9), 2, 1), -0.5)]
    for strategy in (dare, dare_ties):
        first = strategy(terms, generator=seeded()).dense()
        assert torch.equal(strategy(terms, generator=seeded()).dense(), first)
        assert not torch.equal(strategy(terms, generator=seeded(1)).dense(), first)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_entries_are_dropped_or_rescaled(low_rank, density):
    delta = low_rank((60, 50), 4, 0)
    result, change = dare([(delta, 2.0)], density=density, generator=seeded()).dense(), delta.dense()
    kept = result != 0
    torch.testing.assert_close(result[kept], 2 * change[kept] / density)
    # 3000 draws: the share's standard deviation is below 0.01
    assert float(kept.float().mean()) == pytest.approx(density, abs=0.04)


def test_the_expected_result_is_the_sum(low_rank):
    terms = [(low_rank((5, 4), 2, 0), 1.0), (low_rank((5, 4), 2, 1), -0.5)]
    generator = seeded()
    mean = torch.stack([dare(terms, density=0.5, generator=generator).dense() for _ in range(4000)]).mean(0)
    expected = weighted_sum(terms).dense()
    # at density 0.5 each draw of a change misses by as much as the change; 4000 of them by 1/63, times 5 for safety
    spread = sum((weight * delta.dense()).square() for delta, weight in terms).sqrt() / 4000**0.5
    assert ((mean - expected).abs() <= 5 * spread + 1e-6).all()


def test_density_one_drops_nothing(low_rank):
    terms = [(low_rank((3, 2, 3, 3), 2, 0), 0.8), (low_rank((3, 2, 3, 3), 1, 1), -0.4)]
    torch.testing.assert_close(
        dare(terms, density=1.0, generator=seeded()).dense(), weighted_sum(terms).dense()
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_dare_ties_merges_what_dare_left_of_each(low_rank, normalize):
    terms = [(low_rank((6, 5), 2, 0), 1.0), (low_rank((6, 5), 3, 1), -0.7)]
    generator = seeded()
    left = [dare([term], density=0.6, generator=generator).dense() for term in terms]
    expected = merge_agreeing(left, normalize=normalize)
    result = dare_ties(terms, density=0.6, normalize=normalize, generator=seeded())
    torch.testing.assert_close(result.dense(), expected)
