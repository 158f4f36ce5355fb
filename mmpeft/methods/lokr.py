"""LoKr: the Kronecker product of a small matrix and a bigger one, each whole or low-rank.

W' = W + scale * kron(w1, w2), w2 with a Tucker core where there is one. Edalati et al. 2022, "KronA: Parameter
Efficient Tuning with Kronecker Adapter", arXiv:2212.10650; LyCORIS: Yeh et al. 2023, arXiv:2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.delta import Delta, Dense
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.products import shortest, tucker


@dataclass(frozen=True, eq=False)
class LokrLayer(LayerAdapter):
    """The two halves of one layer, (a, c) and (b, d), of a weight of out = a*b and in = c*d.

    Args:
        alpha: as it was saved; counts once. LyCORIS ignores it, and may save inf, where both halves are whole.
        lokr_w1: (a, c), or in its place
        lokr_w1_a: (a, rank) and
        lokr_w1_b: (rank, c).
        lokr_w2: (b, d), of a convolution (b, d, kh, kw), or in its place
        lokr_w2_a: (b, rank) and
        lokr_w2_b: (rank, d), of a convolution (rank, d*kh*kw) or (rank, d, kh, kw); with a core (rank, b) and
            (rank, d).
        lokr_t2: the core, (rank, rank, kh, kw).
        rslora: whether LyCORIS trained it with rs_lora, whose root of the rank stays in the scale of two whole halves;
            of others it is part of the alpha that is saved.
        settings_rank: the rank in PEFT's settings, where both halves are whole: PEFT multiplies by alpha/rank then too.
            None for LyCORIS's layers.
        weight_shape: the weight's shape where it is known; a low-rank w2 without core tells the matrix only.
    """

    alpha: float
    lokr_w1: Tensor | None = None
    lokr_w1_a: Tensor | None = None
    lokr_w1_b: Tensor | None = None
    lokr_w2: Tensor | None = None
    lokr_w2_a: Tensor | None = None
    lokr_w2_b: Tensor | None = None
    lokr_t2: Tensor | None = None
    rslora: bool = False
    settings_rank: int | None = None
    weight_shape: tuple[int, ...] | None = field(default=None, compare=False)
    method: ClassVar[str] = "lokr"

    @property
    def rank(self) -> int | None:
        """The inner dimension of the low-rank halves; None where both are whole."""
        for lower in (self.lokr_w2_b, self.lokr_w1_b):
            if lower is not None:
                return lower.shape[0]
        return None

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        if self.rank is not None:
            return self.alpha / self.rank
        if self.settings_rank is not None:
            return self.alpha / self.settings_rank
        # LyCORIS saves alpha = rank^(3/2) here under rs_lora, and multiplies by the root of the rank
        return self.alpha ** (1 / 3) if self.rslora else 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, or the matrix (out, in*kh*kw)."""
        if self.weight_shape is not None:
            return self.weight_shape
        (a, c), (b, *d) = self.first_shape, self.second_shape
        return a * b, c * d[0], *d[1:]

    @property
    def first_shape(self) -> tuple[int, ...]:
        """The shape of w1: (a, c)."""
        if self.lokr_w1 is not None:
            return tuple(self.lokr_w1.shape)
        assert self.lokr_w1_a is not None
        assert self.lokr_w1_b is not None
        return self.lokr_w1_a.shape[0], self.lokr_w1_b.shape[1]

    @property
    def second_shape(self) -> tuple[int, ...]:
        """The shape of w2: (b, d), (b, d, kh, kw), or (b, d*kh*kw) where its tensors tell no more."""
        if self.lokr_w2 is not None:
            return tuple(self.lokr_w2.shape)
        assert self.lokr_w2_a is not None
        assert self.lokr_w2_b is not None
        if self.lokr_t2 is not None:
            return self.lokr_w2_a.shape[1], self.lokr_w2_b.shape[1], *self.lokr_t2.shape[2:]
        return self.lokr_w2_a.shape[0], *self.lokr_w2_b.shape[1:]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of lokr_w1, lokr_w1_a, lokr_w1_b, lokr_w2, lokr_w2_a, lokr_w2_b and lokr_t2 that there are."""
        names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give the change; exactly low-rank where w2 is and that is the shorter form, else dense."""
        first, (B2, A2) = _product(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b), self._second()
        if B2 is None:
            return Dense((_kron(first, A2) * self.scale).reshape(self.shape))
        if self.lokr_w1_a is not None and self.lokr_w1_b is not None:
            B1, A1 = self.lokr_w1_a.detach().float(), self.lokr_w1_b.detach().float()
        else:
            # kron(w1, B2 A2) = kron(w1, B2) kron(1, A2) = kron(1, B2) kron(w1, A2): the shorter side is the rank
            one = torch.eye(min(first.shape), device=first.device)
            B1, A1 = (one, first) if first.shape[0] < first.shape[1] else (first, one)
        return shortest(_kron(B1, B2) * self.scale, _kron(A1, A2), self.shape)

    def _second(self) -> tuple[Tensor | None, Tensor]:
        """Give w2 as its factors (b, rank) and (rank, d*kh*kw), or None and the whole (b, d*kh*kw), float32."""
        if self.lokr_w2 is not None:
            return None, self.lokr_w2.detach().float().flatten(1)
        assert self.lokr_w2_a is not None
        assert self.lokr_w2_b is not None
        upper = self.lokr_w2_a.detach().float()
        if self.lokr_t2 is not None:
            return upper.T, tucker(self.lokr_t2, self.lokr_w2_b)
        return upper, self.lokr_w2_b.detach().float().flatten(1)


def _kron(first: Tensor, second: Tensor) -> Tensor:
    # torch.kron fails on matrices of one column
    rows, columns = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    return torch.einsum("ac,bd->abcd", first, second).reshape(rows, columns)


def _product(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    if whole is not None:
        return whole.detach().float()
    assert a is not None
    assert b is not None
    return a.detach().float() @ b.detach().float()
