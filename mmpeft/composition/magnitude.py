"""Magnitude pruning: sum what is left of each change when its small entries are gone."""

from functools import reduce

import torch

from mmpeft.composition.entries import check_share, largest
from mmpeft.composition.terms import Terms, weighted_changes
from mmpeft.delta import Delta, Dense


def magnitude(deltas: Terms, *, density: float = 0.5) -> Delta:
    """Keep each change's largest entries and add them: Σ w_i · (the largest entries of Δ_i).

    The first step of TIES alone (Yadav et al. 2023, arXiv:2306.01708), nothing being rescaled. The result has every
    entry of its own: it is not low-rank.

    Args:
        density: share of each change's entries to keep, in (0, 1]; 1 is `sum`.

    Raises:
        ConfigError: `density` is out of its range, or a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
    """
    check_share("density", density)
    return Dense(reduce(torch.add, (largest(change, density) for change in weighted_changes(deltas))))
