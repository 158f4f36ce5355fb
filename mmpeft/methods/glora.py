"""GLoRA: a low-rank change that depends on the base's weight, and one that does not.

W' = W + scale (W A + B), A = a1 a2 and B = b1 b2. Chavan et al. 2023, "One-for-All: Generalized LoRA for
Parameter-Efficient Fine-tuning", arXiv:2306.07967, of which LyCORIS has these two terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.delta import Delta, Dense, LowRank, add
from mmpeft.layer_adapter import WeightDependent
from mmpeft.methods.products import shortest, tucker


@dataclass(frozen=True, eq=False)
class GloraLayer(WeightDependent):
    """The factors of one layer.

    Args:
        a1: (in, rank); of a convolution (in, rank, 1, 1).
        a2: (rank, in); of a convolution (rank, in, 1, 1).
        b1: (out, rank); of a convolution (out, rank, 1, 1).
        b2: (rank, in); of a convolution (rank, in, kh, kw), or with a core (rank, in, 1, 1).
        alpha: as it was saved.
        bm: the core, (rank, rank, kh, kw).
        rslora: whether the scale is alpha/sqrt(rank), as LyCORIS's rs_lora has it, instead of alpha/rank.
    """

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: float
    bm: Tensor | None = None
    rslora: bool = False
    method: ClassVar[str] = "glora"

    @property
    def rank(self) -> int:
        """The inner dimension of either term."""
        return self.a2.shape[0]

    @property
    def scale(self) -> float:
        """What both terms are multiplied by."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape: (out, in) or (out, in, kh, kw)."""
        kernel = self.b2.shape[2:] if self.bm is None else self.bm.shape[2:]
        return self.b1.shape[0], self.b2.shape[1], *kernel

    @property
    def tensors(self) -> dict[str, Tensor]:
        """a1, a2, b1, b2, and bm where there is a core."""
        names = ("a1", "a2", "b1", "b2", "bm")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give the change; low-rank where the kernel has one pixel, else its first term is dense.

        Raises:
            AdapterError: no weight is known, or it has another shape.
        """
        weight = self.weight_for(weight)
        shape, device = tuple(weight.shape), weight.device
        a1, a2, b1, b2 = (
            part.detach().float().to(device).flatten(1) for part in (self.a1, self.a2, self.b1, self.b2)
        )
        lower = b2 if self.bm is None else tucker(self.bm.to(device), b2)
        free = LowRank(b1 * self.scale, lower, shape)
        base = weight.detach().float()
        if all(side == 1 for side in shape[2:]):
            return add([free, shortest(base.flatten(1) @ a1 * self.scale, a2, shape)])
        inputs = torch.einsum("oi...,ir,rj->oj...", base, a1, a2)
        return Dense((free.dense() + inputs * self.scale).reshape(shape))
