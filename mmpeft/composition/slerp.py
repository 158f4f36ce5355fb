"""Spherical interpolation: a direction between the changes, at a length between theirs."""

import math

import torch
from torch import Tensor

from mmpeft.composition.terms import Terms, refuse_unusable
from mmpeft.delta import Delta, add, inner
from mmpeft.errors import MethodError


def slerp(deltas: Terms) -> Delta:
    """Interpolate between the changes on the sphere, and between their lengths on the line.

    With t = w_2/(w_1 + w_2), unit directions u_i, lengths n_i = ‖Δ_i‖ and the angle Ω between the changes, as vectors:
    ((1-t) n_1 + t n_2) · (sin((1-t)Ω) u_1 + sin(tΩ) u_2) / sin Ω. Shoemake 1985, "Animating Rotation with Quaternion
    Curves". For more than two the direction is the spherical mean, for which Σ w_i log_p(u_i) = 0 at the result p: Buss
    and Fillmore 2001, "Spherical Averages and Applications to Spherical Splines and Interpolation", algorithm A1.

    The weights say where between the changes the result lies, not how strong it is: 1 and 1 is the same as 0.5 and 0.5,
    and unlike in `sum` the length is never above the longest change's. A negative weight turns its change around; a
    layer that a single adapter changes has it at that adapter's weight. A combination of the changes is all it takes,
    so low-rank stays low-rank, the ranks adding up.

    Raises:
        ConfigError: a weight is not a finite number.
        MethodError: the changes point away from each other, so that no direction lies between; or one has entries that
            are not finite numbers.
    """
    refuse_unusable(deltas)
    if len(deltas) == 1:
        return deltas[0][0].scaled(deltas[0][1])
    turned = [delta.scaled(math.copysign(1.0, weight)) for delta, weight in deltas]
    shares = torch.tensor([abs(weight) for _, weight in deltas], dtype=torch.float64)
    shares = shares / shares.sum()
    gram = torch.tensor([[inner(one, other) for other in turned] for one in turned], dtype=torch.float64)
    lengths = gram.diagonal().clamp(min=0).sqrt()
    has_direction = lengths > 0
    factors = torch.zeros_like(lengths)
    if has_direction.any():
        chosen = lengths[has_direction]
        cosines = gram[has_direction][:, has_direction] / torch.outer(chosen, chosen)
        factors[has_direction] = _spherical_mean(cosines, shares[has_direction]) / chosen
        factors *= (shares * lengths).sum()
    return add([delta.scaled(factor) for delta, factor in zip(turned, factors.tolist(), strict=True)])


def _spherical_mean(cosines: Tensor, shares: Tensor) -> Tensor:
    """Give the mean p of unit vectors as the coefficients of their combination, (n,), from their cosines (n, n)."""
    shares = shares / shares.sum()
    mean = shares / _length(shares, cosines).clamp(min=1e-12)
    for _ in range(200):
        seen = (cosines @ mean).clamp(-1, 1)
        if seen.min() < -1 + 1e-9 or _length(shares, cosines) < 1e-6:
            raise MethodError(
                "the changes point away from each other, so no direction lies between them for slerp; "
                "choose other weights, or the strategy sum"
            )
        angle = seen.acos()
        pull = shares * torch.where(angle > 1e-6, angle / angle.sin().clamp(min=1e-12), 1.0)
        step = pull - (pull * seen).sum() * mean
        length = _length(step, cosines)
        if length < 1e-12:
            break
        mean = length.cos() * mean + length.sin() / length * step
        mean = mean / _length(mean, cosines)
    return mean


def _length(coefficients: Tensor, cosines: Tensor) -> Tensor:
    return (coefficients @ cosines @ coefficients).clamp(min=0).sqrt()
