"""The branch of a norm: a changed gain or bias is linear in its output, and so mixes live, exactly."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mmpeft.delta import Delta
from mmpeft.live.branch import Branch, Part
from mmpeft.live.slots import Slots, Vectors


def is_norm(layer: nn.Module) -> bool:
    """Tell whether a layer is a GroupNorm, a LayerNorm or any library's RMSNorm, with a gain."""
    weight = getattr(layer, "weight", None)
    has_gain = isinstance(weight, Tensor) and weight.ndim == 1
    has_epsilon = hasattr(layer, "eps") or hasattr(layer, "variance_epsilon")
    is_rms = has_epsilon and "RMSNorm" in type(layer).__name__
    return has_gain and (is_rms or isinstance(layer, nn.GroupNorm | nn.LayerNorm))


class NormBranch(Branch):
    """The branch of a norm: n(x) * gain + bias, where n(x) is its output without the base's own gain and bias."""

    def __init__(self, layer: nn.Module, name: str, capacity: int | None) -> None:
        super().__init__(layer, name, capacity)
        self._has_channels_first = isinstance(layer, nn.GroupNorm)
        self._shape = tuple(getattr(layer.weight, "shape", ()))
        self._gains = Vectors(self._is_static)
        self._settle()

    def changes(self, part: Part) -> list[Tensor]:
        """Build the mix's change of the gain ("weight") or the bias, as float32 tensors to add; empty if none."""
        return (self._gains if part == "weight" else self._biases).change(self._weights)

    def _slots(self) -> tuple[Slots[Any], ...]:
        return self._gains, self._biases

    def _put(self, name: str, part: Part, delta: Delta) -> None:
        (self._gains if part == "weight" else self._biases).put(name, delta.dense())

    def _add(self, output: Tensor, x: Tensor, factors: Tensor | None) -> Tensor:
        if self._gains.counts:
            normed = self._normed(x).to(output.dtype)
            output = output + normed * self._spread(self._gains.sum(factors), output)
        if self._biases.counts:
            output = output + self._spread(self._biases.sum(factors), output)
        return output

    def _normed(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, eps=layer.eps)
        if isinstance(layer, nn.LayerNorm):
            return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        eps = getattr(layer, "eps", None) or getattr(layer, "variance_epsilon", None)
        return F.rms_norm(x, tuple(layer.weight.shape), eps=eps)
