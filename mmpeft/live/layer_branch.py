"""The packed branch of a linear layer or a convolution: what all adapters of a mix change in its output.

For a layer y = W x + b, with the vector and all gains of the mix at their weights:

    y + B_all (vector * (A_all x)) + gain_out * (W x) + W (gain_in * x) + dense x + bias

It is a forward hook. Where the changed weight W' = W + B_all diag(vector) A_all + ... is cheaper to make than the
branch is to run (many tokens, or whole passes of the layer saved), a pre-hook gives the layer an empty batch, which
costs microseconds, and the hook computes the output with W', which small layers keep until the next mix. Only in
float32: half precision would round away part of the change in W', which the branch keeps. And only where nobody else
can see the layer's input.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from mmpeft.delta import Delta, Gain, LowRank, Sum, matrix_shape
from mmpeft.injection import is_adaptable, weight_shape
from mmpeft.live.branch import Branch, Part
from mmpeft.live.slots import Ranks, Slots, Vectors, Wholes

# Reading and writing an entry of the weight takes as long as this many multiplications.
_ENTRY = 40
# Changed weights are kept if they have up to so many entries, or up to so many times as many as the live adapters.
_SMALL, _BESIDE = 1 << 16, 4


class LayerBranch(Branch):
    """The branch of a linear layer or a 2-D convolution; of a grouped convolution, for its bias alone."""

    def __init__(self, layer: nn.Module, name: str, capacity: int | None) -> None:
        super().__init__(layer, name, capacity)
        self._is_conv = self._has_channels_first = isinstance(layer, nn.Conv2d)
        self._shape = weight_shape(layer)
        # a grouped convolution has no slots but its bias's
        reserved = capacity if capacity is None or is_adaptable(layer) else 0
        self._ranks = Ranks(self._shape, reserved)
        self._outputs, self._inputs = Vectors(self._is_static), Vectors(self._is_static)
        self._wholes = Wholes(self._shape, self._is_static)
        self._held: dict[int, Tensor] = {}  # inputs on their way from the pre-hook to the hook, by thread
        # the changed weight, and what it was made of
        self._kept: tuple[tuple[int, int, float], Tensor] | None = None
        self._settle()

    def before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keep the input for the hook, where it is cheaper to run the changed weight: the forward pre-hook."""
        if torch.compiler.is_compiling():
            return None
        if self._held:  # a call that failed before its hook came
            self._held.pop(threading.get_ident(), None)
        if self.is_silent or not self.is_active:
            return None
        if self.conditions is not None or kwargs or len(args) != 1:
            return None
        if not self._can_change(args[0]) or not (self._may_keep() or self._is_changing_cheaper(args[0])):
            return None
        self._held[threading.get_ident()] = args[0]
        return (args[0][:0],), kwargs

    def mix(self, weights: Mapping[str, float], conditions: Any = None) -> None:
        """Set the weights of the adapters that are here, in place."""
        super().mix(weights, conditions)
        self._kept = None

    def attach(self) -> None:
        """Hook the branch on its layer."""
        super().attach()
        self._handles.append(self.layer.register_forward_pre_hook(self.before, with_kwargs=True))

    def read(self, part: Part) -> Tensor | None:
        """Give the base's weight or bias as plain numbers; a quantised layer's by what it makes of unit vectors."""
        home = self._home()
        if part == "bias" or self._is_conv or home.is_meta or self.is_readable(part):
            return super().read(part)
        bias: Tensor | None = getattr(self.layer, "bias", None)
        with torch.no_grad():
            columns: Tensor = self.layer.forward(torch.eye(self._shape[1], device=home.device)).float()
        return (columns if bias is None else columns - bias.float()).T

    def lacks_room_for(self, part: Part, delta: Delta) -> str:
        """Say what a change needs beyond what was reserved; "" if there is room, or nothing was reserved."""
        if part == "bias" or not isinstance(delta, LowRank):
            return super().lacks_room_for(part, delta)
        free = self._ranks.free
        return f"{delta.rank} ranks where {free} are free" if self._is_static and delta.rank > free else ""

    def changes(self, part: Part) -> list[Tensor]:
        """Build the mix's change of the weight or the bias, as float32 tensors to add; empty if it has none."""
        if part == "bias":
            return self._biases.change(self._weights)
        weight = self.layer.weight.detach()
        gains = [_along(0, gain, weight) for gain in self._outputs.change(self._weights)]
        gains += [_along(1, gain, weight) for gain in self._inputs.change(self._weights)]
        low_rank, whole = self._ranks.change(self._weights), self._wholes.change(self._weights)
        return [*low_rank, *whole, *(gain * weight.float() for gain in gains)]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_held": {}, "_kept": None}

    def _settle(self) -> None:
        super()._settle()
        self._kept = None

    def _slots(self) -> tuple[Slots[Any], ...]:
        return self._ranks, self._outputs, self._inputs, self._wholes, self._biases

    def _put(self, name: str, part: Part, delta: Delta) -> None:
        for piece in delta.parts if isinstance(delta, Sum) else (delta,):
            if part == "bias":
                self._biases.put(name, piece.dense())
            elif isinstance(piece, LowRank):
                self._ranks.put(name, piece)
            elif isinstance(piece, Gain):
                (self._outputs if piece.side == "output" else self._inputs).put(name, piece.gain)
            else:
                self._wholes.put(name, piece.dense())

    def _add(self, output: Tensor, x: Tensor, factors: Tensor | None) -> Tensor:
        if self._held and not torch.compiler.is_compiling():
            held = self._held.pop(threading.get_ident(), None)
            if held is not None:
                return self._run(held, *self._changed())
        base = output
        if self._outputs.counts or self._biases.counts:
            output = self._add_vectors(output, factors)
        if self._inputs.counts:
            output = self._add_scaled_passes(output, x, factors)
        if self._wholes.counts:
            output = self._add_wholes(output, x, factors)
        if self._ranks.counts:
            is_ours = output is not base or self._is_alone()
            output = self._add_ranks(output, x, factors, is_ours)
        return output

    def _add_vectors(self, output: Tensor, factors: Tensor | None) -> Tensor:
        """Multiply W x by its gain and add the changed bias: y + gain (y - b) + bias."""
        shift = self._biases.sum(factors) if self._biases.counts else None
        if not self._outputs.counts:
            return output if shift is None else output + self._spread(shift, output)
        gain = self._outputs.sum(factors)
        scaled = output * self._spread(1 + gain, output)
        if (bias := self._bias(output)) is not None:
            of_bias = gain * bias.to(gain.dtype)
            shift = -of_bias if shift is None else shift - of_bias
        return scaled if shift is None else scaled + self._spread(shift, output)

    def _add_scaled_passes(self, output: Tensor, x: Tensor, factors: Tensor | None) -> Tensor:
        """Run the layer again on scaled inputs: once, or for each adapter where factors vary over the output."""
        passes = [(self._inputs.sum(), None)] if factors is None else self._inputs.each(factors)
        bias = self._bias(output)
        for gain, factor in passes:
            again = self.layer.forward(x * (gain[:, None, None] if self._is_conv else gain).to(x.dtype))
            if bias is not None:
                again = again - self._spread(bias, again)
            output = output + (again if factor is None else again * self._spread(factor[..., None], again))
        return output

    def _add_wholes(self, output: Tensor, x: Tensor, factors: Tensor | None) -> Tensor:
        if factors is None:
            return output + self._run(x, self._wholes.sum().to(x.dtype), None).to(output.dtype)
        for change, factor in self._wholes.each(factors):
            more = self._run(x, change.to(x.dtype), None)
            output = output + (more * self._spread(factor[..., None], more)).to(output.dtype)
        return output

    def _add_ranks(self, output: Tensor, x: Tensor, factors: Tensor | None, is_ours: bool) -> Tensor:
        A, B, weights = (packed.to(x.dtype) for packed in self._ranks.active(factors))
        hidden = self._run(x, A, None)
        # the weights meet whichever is smaller
        if factors is None and B.numel() < hidden.numel():
            B = B * weights
        else:
            hidden = hidden * self._spread(weights, hidden)
        if output.dtype != hidden.dtype or B.dtype != hidden.dtype:  # autocast, quantised layers
            more = F.conv2d(hidden, B[:, :, None, None]) if self._is_conv else F.linear(hidden, B)
            return output + more.to(output.dtype)
        add = _add_to_image if self._is_conv else _add_to_rows
        may_overwrite = is_ours and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        return add(output, hidden, B, may_overwrite)

    def _changed(self) -> tuple[Tensor, Tensor | None]:
        """Give the changed weight and bias; the weight is kept where that takes little memory."""
        bias = self.layer.bias
        if self._biases.counts:
            bias = self._biases.sum() if bias is None else bias + self._biases.sum()
        if not self._may_keep():
            return self._changed_weight(), bias
        weight = self.layer.weight
        # the version counts what others change in place; the sum tells of `weight.data += ...`, which is not counted
        version = 0 if weight.is_inference() else weight._version
        seen = weight.data_ptr(), version, float(weight.sum())
        kept = self._kept
        if kept is None or kept[0] != seen:
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = seen, self._changed_weight()
        return kept[1], bias

    def _may_keep(self) -> bool:
        """Whether the changed weight is small, by itself or beside the adapters; its check would hold a GPU up."""
        out, inputs = matrix_shape(self._shape)
        is_small = out * inputs <= max(_SMALL, _BESIDE * self._ranks.count * (out + inputs))
        return is_small and bool(self.layer.weight.device.type == "cpu")

    def _changed_weight(self) -> Tensor:
        weight: Tensor = self.layer.weight
        changed = weight
        if self._outputs.counts:
            changed = torch.addcmul(changed, weight, _along(0, self._outputs.sum(), weight))
        if self._inputs.counts:
            changed = torch.addcmul(changed, weight, _along(1, self._inputs.sum(), weight))
        if self._wholes.counts:
            changed = changed + self._wholes.sum()
        if self._ranks.counts:
            A, B, weights = self._ranks.active()
            changed = torch.addmm(changed.flatten(1), B * weights, A.flatten(1)).view_as(weight)
        if changed.stride() != weight.stride():  # the memory format decides the output's
            changed = torch.empty_like(weight).copy_(changed)
        return changed

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._is_conv:
            return F.linear(x, weight, bias)
        # it knows the layer's stride, padding and padding mode
        output: Tensor = self.layer._conv_forward(x, weight, bias)
        return output

    def _bias(self, output: Tensor) -> Tensor | None:
        """Give the layer's bias (out,), or None; of an offloaded layer from its output for zeros."""
        bias: Tensor | None = getattr(self.layer, "bias", None)
        if bias is None or bias.device == output.device:
            return bias
        zeros = torch.zeros(1, *self._shape[1:], device=output.device, dtype=output.dtype)
        read: Tensor = self.layer.forward(zeros).reshape(self._shape[0], -1)[:, 0]
        return read

    def _is_alone(self) -> bool:
        """Whether nobody else sees the layer's input and output, and nothing is in the place of its `forward`."""
        return (
            type(self.layer) in (nn.Linear, nn.Conv2d)
            and "forward" not in self.layer.__dict__
            and len(self.layer._forward_hooks) == len(self.layer._forward_pre_hooks) == 1
            and not torch_module._global_forward_hooks
            and not torch_module._global_forward_pre_hooks
        )

    def _can_change(self, x: Any) -> bool:
        weight = getattr(self.layer, "weight", None)
        return (
            not torch.is_grad_enabled()
            and type(weight) is nn.Parameter
            and isinstance(x, Tensor)
            and x.dtype == weight.dtype == torch.float32
            and x.device == weight.device
            and x.ndim >= (4 if self._is_conv else 2)
            and not torch.is_autocast_enabled(x.device.type)
            and self._is_alone()
        )

    def _is_changing_cheaper(self, x: Tensor) -> bool:
        """Compare multiplications: the branch's for all tokens, with those of making the changed weight."""
        out, inputs = matrix_shape(self._shape)
        tokens = x.numel() // self._shape[1] // (prod(self.layer.stride) if self._is_conv else 1)
        passes = int(self._inputs.counts) + int(self._wholes.counts)
        branch = tokens * (self._ranks.count * (inputs + out) + passes * inputs * out)
        return branch > (self._ranks.count + _ENTRY * (1 + passes)) * inputs * out


def _add_to_rows(output: Tensor, hidden: Tensor, B: Tensor, may_overwrite: bool) -> Tensor:
    """Add hidden (..., R) @ Bᵀ to an output (..., out)."""
    rows, factors = output.reshape(-1, output.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    if may_overwrite and output.is_contiguous():
        rows.addmm_(factors, B.T)
        return output
    return torch.addmm(rows, factors, B.T).view(output.shape)


def _add_to_image(output: Tensor, hidden: Tensor, B: Tensor, may_overwrite: bool) -> Tensor:
    """Add B @ hidden (N, R, h, w) to an output (N, out, h, w), in its memory format."""
    if not output.is_contiguous() and output.is_contiguous(memory_format=torch.channels_last):
        added = _add_to_rows(output.permute(0, 2, 3, 1), hidden.permute(0, 2, 3, 1), B, may_overwrite)
        return added.permute(0, 3, 1, 2)
    factors = B.expand(len(output), -1, -1)
    if may_overwrite and output.is_contiguous():
        output.flatten(2).baddbmm_(factors, hidden.flatten(2))
        return output
    return torch.baddbmm(output.flatten(2), factors, hidden.flatten(2)).reshape(output.shape)


def _along(axis: int, gain: Tensor, weight: Tensor) -> Tensor:
    """Bring a gain into a form that multiplies a weight along its outputs (0) or inputs (1)."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    return gain.to(weight.device).reshape(shape)
