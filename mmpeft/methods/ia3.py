"""(IA)³: every output, or every input, of a layer is multiplied by a number that is learned.

W' = diag(l) W, or W diag(l). Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning", arXiv:2205.05638. PEFT multiplies a layer's output with its bias in it, so the bias changes too;
LyCORIS multiplies the weight alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mmpeft.delta import Delta, Dense, Gain, Side
from mmpeft.layer_adapter import WeightDependent


@dataclass(frozen=True, eq=False)
class Ia3Layer(WeightDependent):
    """The multipliers of one layer's weight, or of a bias.

    Args:
        scaling: n multipliers, one for each output or input, in any shape.
        side: what has one each; of a bias "output".
        is_difference: whether `scaling` is the multiplier - 1, as LyCORIS saves it, instead of the multiplier.
        weight_shape: the shape of what is multiplied where it is known; the tensor tells one side of it.
    """

    scaling: Tensor
    side: Side
    is_difference: bool = False
    weight_shape: tuple[int, ...] | None = field(default=None, compare=False)
    method: ClassVar[str] = "ia3"

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, with -1 where it is not known."""
        if self.base_weight is not None:
            return tuple(self.base_weight.shape)
        if self.weight_shape is not None:
            return self.weight_shape
        sides = (self.scaling.numel(), -1) if self.side == "output" else (-1, self.scaling.numel())
        return (*sides, *[-1] * (self.scaling.ndim - 2))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The multipliers, or what they differ from 1 by: scaling."""
        return {"scaling": self.scaling}

    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give the gain of each output or input of the base's weight; of a bias its change, dense.

        Raises:
            AdapterError: no weight is known, or it has another shape.
        """
        weight = self.weight_for(weight)
        gain = self.scaling.detach().float().flatten().to(weight.device) - (0 if self.is_difference else 1)
        return Dense(gain * weight.detach().float()) if weight.ndim == 1 else Gain(gain, self.side, weight)
