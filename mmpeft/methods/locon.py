"""LoCon: LoRA of convolutions with a Tucker core between the factors, and LoRA with a sparse rest beside it.

W' = W + (alpha / rank) (B (core x A) + rest). With a core of (rank, rank, kh, kw), A sees single pixels. The rest holds
the largest entries that an extracted LoRA misses. Yeh et al. 2023, "Navigating Text-To-Image Customization: From
LyCORIS Fine-Tuning to Model Evaluation", arXiv:2309.14859. Plain LoCon, without core and rest, is LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.delta import Delta, Dense, LowRank, add
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.products import tucker


@dataclass(frozen=True, eq=False)
class LoconLayer(LayerAdapter):
    """The factors of one layer, with a core, a rest, or both.

    Args:
        lora_A: (rank, in); with a core (rank, in, 1, 1); without one, of a convolution, (rank, in, kh, kw).
        lora_B: (out, rank); of a convolution (out, rank, 1, 1).
        alpha: as it was saved.
        lora_mid: (rank, rank, kh, kw).
        rest_indices: (2, n), rows and columns in the weight seen as a matrix.
        rest_values: (n,).
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    lora_mid: Tensor | None = None
    rest_indices: Tensor | None = None
    rest_values: Tensor | None = None
    method: ClassVar[str] = "locon"

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        """What the change is multiplied by."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape: (out, in) or (out, in, kh, kw)."""
        if self.lora_mid is None:
            return self.lora_B.shape[0], *self.lora_A.shape[1:]
        return self.lora_B.shape[0], self.lora_A.shape[1], *self.lora_mid.shape[2:]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """lora_A, lora_B, and what there is of lora_mid, rest_indices and rest_values."""
        names = ("lora_A", "lora_B", "lora_mid", "rest_indices", "rest_values")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give the change, low-rank but for a rest; the base's weight is not needed."""
        lower = self.lora_A.flatten(1) if self.lora_mid is None else tucker(self.lora_mid, self.lora_A)
        change = LowRank(self.lora_B.detach().float().flatten(1) * self.scale, lower, self.shape)
        if self.rest_indices is None or self.rest_values is None:
            return change
        rest = torch.zeros(change.shape[0], lower.shape[1], device=lower.device)
        rows, columns = self.rest_indices.long()
        rest[rows, columns] = self.rest_values.detach().float() * self.scale
        return add([change, Dense(rest.reshape(self.shape))])
