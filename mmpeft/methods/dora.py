"""DoRA: the direction of a weight changes by LoRA, its magnitude per output on its own.

W' = m * (W + s B A) / ‖W + s B A‖, the norm of each output's row. Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank
Adaptation", arXiv:2402.09353, equation 5; in training the norm is a constant for the gradient (section 4.3). Attached
through PEFT, whose magnitude is per output for linear layers and convolutions alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmpeft.delta import Delta, Gain, LowRank, add
from mmpeft.errors import AdapterError
from mmpeft.methods.base import MethodSettings
from mmpeft.methods.lora import Lora, LoraLayer, LoraSettings


class DoraSettings(LoraSettings):
    """Weight-decomposed low-rank adaptation: LoRA's settings, and a magnitude that learns."""

    name: Literal["dora"] = "dora"  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class DoraLayer(LoraLayer):
    """LoRA's factors of one layer, and the magnitude of each output.

    Args:
        lora_magnitude_vector: (out,); of a convolution (1, out, 1, 1).
    """

    lora_magnitude_vector: Tensor = field(kw_only=True)
    method: ClassVar[str] = "dora"
    needs_weight: ClassVar[bool] = True

    @property
    def tensors(self) -> dict[str, Tensor]:
        """lora_A, lora_B and lora_magnitude_vector."""
        return {**super().tensors, "lora_magnitude_vector": self.lora_magnitude_vector}

    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give W' - W for the base's weight: a gain of each output of W, and a low-rank change.

        Args:
            weight: (out, in) or (out, in, kh, kw); computed in float32.

        Raises:
            AdapterError: no weight was given, or one of another shape.
        """
        if weight is None:
            raise AdapterError("the change of a DoRA layer depends on the base's weight; give it")
        if tuple(weight.shape) != self.shape:
            raise AdapterError(f"this DoRA layer belongs to a weight {self.shape}; got {tuple(weight.shape)}")
        low_rank = self.low_rank()
        B, A = low_rank.lora_B.to(weight.device), low_rank.lora_A.to(weight.device)
        # W' = gain (W + B A) = W + (gain - 1) W + (gain B) A
        norm = torch.linalg.vector_norm(weight.detach().float().flatten(1) + B @ A, dim=1)
        gain = self.lora_magnitude_vector.detach().float().to(weight.device).flatten() / norm
        return add([LowRank(gain[:, None] * B, A, self.shape), Gain(gain - 1, "output", weight)])


class Dora(Lora):
    """DoRA through PEFT."""

    settings_type: ClassVar[type[MethodSettings]] = DoraSettings
    layer_type: ClassVar[type[LoraLayer]] = DoraLayer
    use_dora: ClassVar[bool] = True
    places: ClassVar[Mapping[str, str]] = {**Lora.places, "lora_magnitude_vector": "lora_magnitude_vector"}
