"""What strategies do entry by entry: keep the largest, elect a sign, merge those that agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft.errors import ConfigError


def check_share(name: str, value: float) -> None:
    """Refuse a setting that is no share above 0 and up to 1.

    Raises:
        ConfigError: it is not.
    """
    if not 0 < value <= 1:
        raise ConfigError(f"{name}: must be a share above 0 and at most 1; got {value}")


def largest(change: Tensor, density: float) -> Tensor:
    """Keep the entries of largest magnitude and set the others to 0.

    Args:
        change: any shape.
        density: share of the entries to keep, rounded down, at least one; entries as large as the smallest kept stay
            too, so that nothing depends on their order.
    """
    kept = max(1, int(density * change.numel()))
    magnitude = change.abs().flatten()
    smallest = magnitude.kthvalue(change.numel() - kept + 1).values
    return torch.where(change.abs() >= smallest, change, 0)


def merge_agreeing(changes: Sequence[Tensor], *, normalize: bool) -> Tensor:
    """Elect each entry's sign by total mass and merge the changes that have it.

    γ = sgn(Σ_i c_i); the result is Σ_{i: sgn(c_i) = γ} c_i, divided by how many agree if `normalize`; 0 where the mass
    cancels to nothing. Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", arXiv:2306.01708,
    section 3.

    Args:
        changes: already weighted, of one shape.
        normalize: whether to take the mean instead of the sum of those that agree.
    """
    # float64 sums of float32 numbers hardly depend on their order
    mass = torch.zeros_like(changes[0], dtype=torch.float64)
    for change in changes:
        mass += change
    sign = mass.sign().to(changes[0].dtype)
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for change in changes:
        agrees = change * sign > 0
        total += torch.where(agrees, change, 0)
        count += agrees
    return total / count.clamp(min=1) if normalize else total
