"""The best approximation of the weighted sum at a rank, an error or an energy."""

from mmpeft.composition.terms import Terms, weighted
from mmpeft.delta import Delta, add, truncate


def truncated_sum(
    deltas: Terms, *, rank: int | None = None, error: float | None = None, energy: float | None = None
) -> Delta:
    """Truncate Σ w_i Δ_i to the closest change of a lower rank; of a single adapter, shrink it.

    Done on the factors: QR of the stacked B and A, singular values of the small core; optimal by Eckart and Young 1936.
    Where nothing is asked for, only what float32 cannot resolve is dropped.

    Args:
        rank: the most that the result may have; a cap on what `error` and `energy` choose.
        error: take the smallest rank whose relative Frobenius error is at most this, in [0, 1].
        energy: take the smallest rank that keeps this share of ‖Σ w_i Δ_i‖², in [0, 1].

    Raises:
        ConfigError: a setting is out of its range, or a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
    """
    return truncate(add(weighted(deltas)), rank=rank, error=error, energy=energy)[0]
