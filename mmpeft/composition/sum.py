"""The exact weighted sum."""

from mmpeft.composition.terms import Terms, weighted
from mmpeft.delta import Delta, add


def weighted_sum(deltas: Terms) -> Delta:
    """Add the changes, exactly: Σ w_i Δ_i.

    What a live mix at these weights does. Low-rank changes stay low-rank, their ranks adding up. Task arithmetic of
    Ilharco et al. 2022, "Editing Models with Task Arithmetic", arXiv:2212.04089; a negative weight takes away.

    Raises:
        ConfigError: a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
    """
    return add(weighted(deltas))
