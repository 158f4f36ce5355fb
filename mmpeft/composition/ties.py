"""TIES: trim, elect signs, merge what agrees."""

from mmpeft.composition.entries import check_share, largest, merge_agreeing
from mmpeft.composition.terms import Terms, weighted_changes
from mmpeft.delta import Delta, Dense


def ties(deltas: Terms, *, density: float = 0.5, normalize: bool = True) -> Delta:
    """Keep each change's largest entries, elect each entry's sign, and take the mean of those that agree.

    c_i = w_i · (the largest entries of Δ_i); γ = sgn(Σ_i c_i); result = mean of the c_i with sgn(c_i) = γ, entry by
    entry, in one layer at a time. Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models",
    arXiv:2306.01708, section 3, where the weights are one λ. The result has every entry of its own: it is not low-rank.

    Signs are elected on the weighted changes, so a strong adapter outvotes a weak one and a negative weight turns its
    change around. As in the paper the mean counts adapters: an entry that only one has stays at its full strength, one
    in which k agree is the k-th part of what `sum` gives. `normalize=False` adds those that agree: at density 1 and
    without conflicts that is `sum`. (mergekit divides by the agreeing weights instead, which takes the strength, and a
    negative weight's sign, out again.)

    Args:
        density: share of each change's entries to keep, in (0, 1].
        normalize: whether to take the mean of those that agree instead of their sum.

    Raises:
        ConfigError: `density` is out of its range, or a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
    """
    check_share("density", density)
    trimmed = [largest(change, density) for change in weighted_changes(deltas)]
    return Dense(merge_agreeing(trimmed, normalize=normalize))
