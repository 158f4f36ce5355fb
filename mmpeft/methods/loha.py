"""LoHa: the entry-wise product of two low-rank changes, which has the rank of both multiplied.

W' = W + (alpha / rank) (w1_a w1_b) * (w2_a w2_b); with Tucker cores, each half is w_a (t x w_b). Hyeon-Woo et al. 2021,
"FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", arXiv:2108.06098; LyCORIS: Yeh et
al. 2023, arXiv:2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mmpeft.delta import Delta
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.products import shortest, tucker


@dataclass(frozen=True, eq=False)
class LohaLayer(LayerAdapter):
    """The four factors of one layer, and two cores where it is Tucker-decomposed.

    Args:
        hada_w1_a: (out, rank); with cores (rank, out).
        hada_w1_b: (rank, in), of a convolution (rank, in*kh*kw); with cores (rank, in).
        hada_w2_a: as hada_w1_a.
        hada_w2_b: as hada_w1_b.
        alpha: as it was saved; counts once.
        hada_t1: (rank, rank, kh, kw).
        hada_t2: as hada_t1.
        weight_shape: the weight's shape where it is known; without cores the tensors tell the matrix only.
    """

    hada_w1_a: Tensor
    hada_w1_b: Tensor
    hada_w2_a: Tensor
    hada_w2_b: Tensor
    alpha: float
    hada_t1: Tensor | None = None
    hada_t2: Tensor | None = None
    weight_shape: tuple[int, ...] | None = field(default=None, compare=False)
    method: ClassVar[str] = "loha"

    @property
    def rank(self) -> int:
        """The inner dimension of each half."""
        return self.hada_w1_b.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, or the matrix (out, in*kh*kw)."""
        if self.weight_shape is not None:
            return self.weight_shape
        if self.hada_t1 is None:
            return self.hada_w1_a.shape[0], self.hada_w1_b.shape[1]
        return self.hada_w1_a.shape[1], self.hada_w1_b.shape[1], *self.hada_t1.shape[2:]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, and hada_t1 and hada_t2 where there are cores."""
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give the change; exactly low-rank, of rank², where that is the shorter form, else dense."""
        B1, A1 = _half(self.hada_w1_a, self.hada_w1_b, self.hada_t1)
        B2, A2 = _half(self.hada_w2_a, self.hada_w2_b, self.hada_t2)
        # (B1 A1) * (B2 A2) = sum over pairs of ranks of (B1_i * B2_j)(A1_i * A2_j)
        lora_B = (B1[:, :, None] * B2[:, None, :]).flatten(1) * self.scale
        return shortest(lora_B, (A1[:, None] * A2[None]).flatten(0, 1), self.shape)


def _half(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    upper = a.detach().float()
    return (upper, b.detach().float()) if core is None else (upper.T, tucker(core, b))
