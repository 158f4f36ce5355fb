"""DARE: drop entries at random and rescale the others."""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from mmpeft.composition.entries import check_share, merge_agreeing
from mmpeft.composition.terms import Terms, weighted_changes
from mmpeft.delta import Delta, Dense


def dare(deltas: Terms, *, density: float = 0.5, generator: torch.Generator) -> Delta:
    """Drop entries of each change at random, rescale the others by 1/density, and add: Σ w_i (m_i ⊙ Δ_i) / density.

    m_i is 1 with probability `density`, so that the expected result is `sum`. Yu et al. 2024, "Language Models are
    Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", arXiv:2311.03099, whose drop
    rate p is 1 - density. The result has every entry of its own: it is not low-rank.

    Args:
        density: share of the entries to keep, in (0, 1]; 1 is `sum`.
        generator: on the CPU; the changes draw from it in their order, so another order is another draw.

    Raises:
        ConfigError: `density` is out of its range, or a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
    """
    return Dense(reduce(torch.add, _dropped(deltas, density, generator)))


def dare_ties(
    deltas: Terms, *, density: float = 0.5, normalize: bool = True, generator: torch.Generator
) -> Delta:
    """Drop entries at random as `dare` does, then elect signs and merge what agrees as `ties` does.

    Args:
        density: share of the entries to keep, in (0, 1].
        normalize: whether to take the mean of those that agree instead of their sum; see `ties`.
        generator: on the CPU; the changes draw from it in their order, so another order is another draw.

    Raises:
        ConfigError: `density` is out of its range, or a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
    """
    return Dense(merge_agreeing(list(_dropped(deltas, density, generator)), normalize=normalize))


def _dropped(deltas: Terms, density: float, generator: torch.Generator) -> Iterator[Tensor]:
    check_share("density", density)
    for change in weighted_changes(deltas):
        kept = torch.rand(change.shape, generator=generator) < density
        yield torch.where(kept.to(change.device), change / density, 0)
