"""Intervals for means of few samples."""

from collections.abc import Hashable, Sequence

import numpy as np


def interval(
    values: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Give the percentile bootstrap interval of a mean.

    Efron 1979, "Bootstrap Methods: Another Look at the Jackknife"; 2,000 resamples, seeded. Samples that belong
    together (one caption drawn from several seeds) are resampled together, since they vary together. A share of 0 or
    1 has no spread to resample: the rule of three then bounds it (Hanley and Lippman-Hand 1983, "If Nothing Goes
    Wrong, Is Everything All Right?"), with the number of groups as its count.

    Args:
        values: one number a sample, at least one; booleans for a share.
        groups: of each sample what it belongs to; each sample by itself when left out.
        level: share of resamples inside.
        seed: of the resampling.
    """
    is_share = np.asarray(values).dtype == bool
    numbers = np.asarray(values, dtype=np.float64)
    labels = list(range(len(numbers))) if groups is None else list(groups)
    index = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    of = np.array([index[label] for label in labels])
    sums, sizes = np.bincount(of, numbers), np.bincount(of)
    random = np.random.default_rng(seed)
    chosen = random.integers(0, len(sums), (2000, len(sums)))
    means = sums[chosen].sum(1) / sizes[chosen].sum(1)
    low, high = (float(bound) for bound in np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))
    if is_share:
        bound = min(1.0, float(-np.log(1 - level)) / len(sums))
        low = 1 - bound if numbers.all() else low
        high = bound if not numbers.any() else high
    return round(low, 4), round(high, 4)
