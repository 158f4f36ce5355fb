"""DoRA: the direction of a weight changes by LoRA, its magnitude per output on its own.

W' = m * (W + s B A) / ‖W + s B A‖, the norm of each output's row. Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank
Adaptation", arXiv:2402.09353, equation 5; in training the norm is a constant for the gradient (section 4.3). Attached
through PEFT, whose magnitude is per output for linear layers and convolutions alike. LyCORIS decomposes LoCon, LoHa and
LoKr alike, and has a second form: W' = (W + change) * m / norm with a magnitude and a norm per input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmpeft.delta import Delta, Dense, Gain, LowRank, Side, add, matrix_shape
from mmpeft.layer_adapter import LayerAdapter, WeightDependent
from mmpeft.methods.base import MethodSettings
from mmpeft.methods.lora import Lora, LoraLayer, LoraSettings

# LyCORIS adds it to every norm; PEFT does not, and at a norm of 0 has no number to give.
_EPSILON = float(torch.finfo(torch.float32).eps)


class DoraSettings(LoraSettings):
    """Weight-decomposed low-rank adaptation: LoRA's settings, and a magnitude that learns."""

    name: Literal["dora"] = "dora"  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class DoraLayer(WeightDependent, LoraLayer):
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
        return decomposed(self.low_rank(), self.lora_magnitude_vector, "output", self.weight_for(weight))


@dataclass(frozen=True, eq=False)
class WeightDecomposedLayer(WeightDependent):
    """The change of one layer's direction by any low-rank method, and the magnitude of each output or each input.

    Args:
        direction: LoRA's, LoCon's, LoHa's or LoKr's layer adapter.
        dora_scale: (out, 1) or (out, 1, 1, 1); for side "input" (1, in) or (1, in, 1, 1).
        side: what has one magnitude each.
    """

    direction: LayerAdapter
    dora_scale: Tensor
    side: Side
    method: ClassVar[str] = "weight_decomposed"

    @property
    def alpha(self) -> float:
        """The direction's, as it was saved."""
        return float(self.settings["alpha"])

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, as the direction tells it."""
        return self.direction.shape

    @property
    def settings(self) -> dict[str, Any]:
        """The direction's settings and method, and the side."""
        return {**self.direction.settings, "direction": self.direction.method, "side": self.side}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The direction's tensors and dora_scale."""
        return {**self.direction.tensors, "dora_scale": self.dora_scale}

    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give W' - W for the base's weight: a gain of each output or input of W, and the direction's change with it.

        Raises:
            AdapterError: no weight is known, or it has another shape.
        """
        return decomposed(self.direction.delta(), self.dora_scale, self.side, self.weight_for(weight))


def decomposed(change: Delta, magnitude: Tensor, side: Side, weight: Tensor) -> Delta:
    """Give gain * (W + change) - W with gain = magnitude / norm of (W + change), exactly.

    Args:
        change: of the direction, in the weight's shape or as its matrix.
        magnitude: one number for each output or input, in any shape.
        side: what has one magnitude each.
        weight: the base's, (out, in) or (out, in, kh, kw); computed in float32.
    """
    shape, device = tuple(weight.shape), weight.device
    new = weight.detach().float() + change.dense().to(device).reshape(shape)
    rows = new.flatten(1) if side == "output" else new.transpose(0, 1).flatten(1)
    gain = magnitude.detach().float().to(device).flatten() / (
        torch.linalg.vector_norm(rows, dim=1) + _EPSILON
    )
    # W' = gain (W + change) = W + (gain - 1) W + gain change
    return add([_scaled(change, gain, side, shape), Gain(gain - 1, side, weight)])


def _scaled(change: Delta, gain: Tensor, side: Side, shape: tuple[int, ...]) -> Delta:
    """Multiply each output or input of a change, which stays low-rank if it is."""
    out, columns = matrix_shape(shape)
    factor = gain[:, None] if side == "output" else gain.repeat_interleave(columns // len(gain))
    if not isinstance(change, LowRank):
        return Dense((change.dense().to(gain.device).reshape(out, columns) * factor).reshape(shape))
    B, A = change.lora_B.to(gain.device), change.lora_A.to(gain.device)
    return LowRank(factor * B, A, shape) if side == "output" else LowRank(B, A * factor, shape)


class Dora(Lora):
    """DoRA through PEFT."""

    settings_type: ClassVar[type[MethodSettings]] = DoraSettings
    layer_type: ClassVar[type[LoraLayer]] = DoraLayer
    use_dora: ClassVar[bool] = True
    places: ClassVar[Mapping[str, str]] = {**Lora.places, "lora_magnitude_vector": "lora_magnitude_vector"}
