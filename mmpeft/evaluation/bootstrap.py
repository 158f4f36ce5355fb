"""Intervals for means of few samples."""

from collections.abc import Callable, Sequence

import numpy as np


def interval(
    values: Sequence[float],
    *,
    statistic: Callable[[np.ndarray], float] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Give the percentile bootstrap interval of a statistic, the mean by default.

    Efron 1979, "Bootstrap Methods: Another Look at the Jackknife"; 2,000 resamples, seeded. A share of 0 or 1 has no
    spread to resample: Hanley and Lippman-Hand's rule of three then bounds it (1983, "If Nothing Goes Wrong, Is
    Everything All Right?").

    Args:
        values: one number a sample, at least one.
        statistic: maps an index array into `values` to a number; the mean of those values by default.
        level: share of resamples inside.
        seed: of the resampling.
    """
    numbers = np.asarray(values, dtype=np.float64)
    measure = statistic or (lambda chosen: float(numbers[chosen].mean()))
    count = len(numbers)
    random = np.random.default_rng(seed)
    resampled = [measure(random.integers(0, count, count)) for _ in range(2000)]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    if statistic is None and set(numbers.tolist()) <= {0.0, 1.0}:
        bound = min(1.0, -np.log(1 - level) / count)
        low = 1 - bound if numbers.all() else low
        high = bound if not numbers.any() else high
    return round(float(low), 4), round(float(high), 4)
