"""The branch of one layer: what the adapters of a mix change in its output, added by a forward hook."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmpeft.delta import Delta
from mmpeft.live.slots import Slots, Vectors

Part = Literal["weight", "bias"]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Branch(ABC):
    """What is alike for layers and norms: adapters by name, their weights, and packing beside the input."""

    bank: weakref.ref[Any] | None = None
    """the bank that it belongs to; none for the branch of a copied or unpickled model"""

    def __init__(self, layer: nn.Module, name: str, capacity: int | None) -> None:
        self.layer: Any = layer
        self.name = name
        self.is_silent = False
        self.is_active = False
        self.conditions: Any = None  # gives the factors while the mix varies here
        self._is_static = capacity is not None
        self.names: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._weights: dict[str, float] = {}
        self._has_channels_first = False
        self._shape: tuple[int, ...] = ()
        self._biases = Vectors(self._is_static)
        self._packed: tuple[torch.device, torch.dtype] | None = None

    @abstractmethod
    def _slots(self) -> tuple[Slots[Any], ...]:
        """Give all kinds of slots."""

    @abstractmethod
    def _put(self, name: str, part: Part, delta: Delta) -> None:
        """Put a change into the slots of its kind."""

    @abstractmethod
    def changes(self, part: Part) -> list[Tensor]:
        """Build the mix's change of the weight or the bias, as float32 tensors to add; empty if it has none."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the mix changes here."""
        weights = self._weights
        has_weight = any(slots.matter(weights) for slots in self._slots() if slots is not self._biases)
        found: dict[Part, bool] = {"weight": has_weight, "bias": self._biases.matter(weights)}
        return tuple(part for part, is_changed in found.items() if is_changed)

    def is_readable(self, part: Part) -> bool:
        """Whether the base's weight or bias lies there as plain numbers."""
        tensor = getattr(self.layer, part, None)
        return (
            isinstance(tensor, Tensor)
            and type(tensor) in (Tensor, nn.Parameter)
            and tensor.dtype in _FLOATS
            and not tensor.is_meta
            and (part == "bias" or tuple(tensor.shape) == self._shape)
        )

    @abstractmethod
    def _add(self, output: Tensor, x: Tensor, factors: Tensor | None) -> Tensor:
        """Add to the layer's output what the adapters change, with factors (..., adapters) where they vary."""

    def attach(self) -> None:
        """Hook the branch on its layer."""
        self._handles.append(self.layer.register_forward_hook(self, with_kwargs=True))
        self.layer._apply = self.follow

    def detach(self) -> None:
        """Leave the layer as it was found."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.layer.__dict__.pop("_apply", None)

    def read(self, part: Part) -> Tensor | None:
        """Give the base's weight or bias as plain numbers; None if that cannot be."""
        return getattr(self.layer, part).detach() if self.is_readable(part) else None

    def lacks_room_for(self, part: Part, delta: Delta) -> str:
        """Say what a change needs beyond what was reserved; "" if there is room, or nothing was reserved."""
        return "changes that are not low-rank" if self._is_static else ""

    def put(self, name: str, part: Part, delta: Delta) -> None:
        """Add an adapter's change of the weight or the bias, with weight 0 until a mix names it."""
        self._put(name, part, delta)
        if name not in self.names:
            self.names.append(name)
        self._settle()

    def remove(self, name: str) -> None:
        """Take an adapter out, if it is here."""
        if name not in self.names:
            return
        self.names.remove(name)
        for slots in self._slots():
            slots.remove(name)
        self._settle()

    def mix(self, weights: Mapping[str, float], conditions: Any = None) -> None:
        """Set the weights of the adapters that are here, in place.

        Args:
            weights: the constant part at this layer, by name.
            conditions: what gives the factors that vary, if any adapter's here do.
        """
        self._weights = {name: weights[name] for name in self.names}
        self.is_active = any(self._weights.values())
        self.conditions = conditions if self.is_active else None
        with torch.inference_mode(False), torch.no_grad():
            for slots in self._slots():
                slots.mix(self._weights)

    def follow(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move the layer, in the place of its `_apply`, and the packed tensors after it."""
        moved: nn.Module = type(self.layer)._apply(self.layer, fn, recurse)
        self._settle()
        return moved

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Add what the mix changes: the forward hook."""
        if self.is_silent or not (self._is_static or self.is_active):
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        self._pack(x)
        changed = self._add(output, x, self._factors(output))
        if self._home().device != x.device and not torch.compiler.is_compiling():
            self._settle()  # the layer's weight is offloaded between passes, so its adapters are too
        return changed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bank": None}

    def _factors(self, output: Tensor) -> Tensor | None:
        """Give what varies now, (B or 1, places or 1, adapters), for an image (B or 1, h or 1, w or 1, adapters)."""
        if self.conditions is None:
            return None
        if self._has_channels_first and output.ndim == 4:
            factors = self.conditions.factors(tuple(self.names), self.name, output, "conv")
            return None if factors is None else factors.movedim(1, -1)
        places = output.movedim(1, -1) if self._has_channels_first else output
        varying: Tensor | None = self.conditions.factors(tuple(self.names), self.name, places, "linear")
        return varying

    def _spread(self, numbers: Tensor, output: Tensor) -> Tensor:
        """Bring numbers for each channel, (n,), or for each place and channel, (..., n), into the output's form."""
        if self._has_channels_first:
            apart = [1] * (output.ndim - 2)
            numbers = numbers.reshape(-1, *apart) if numbers.ndim == 1 else numbers.movedim(-1, 1)
        return numbers.to(output.dtype)

    def _settle(self) -> None:
        """Pack where the layer is, after adapters came or went or the layer moved."""
        self._weights = {name: self._weights.get(name, 0.0) for name in self.names}
        self.is_active = any(self._weights.values())
        home = self._home()
        self._pack_for(home.device, home.dtype if home.dtype in _FLOATS else torch.float32)

    def _home(self) -> Tensor:
        """Give a tensor that lies where the layer does."""
        weight = getattr(self.layer, "weight", None)
        return weight if isinstance(weight, Tensor) else next(self.layer.buffers(), torch.empty(0))

    def _pack_for(self, device: torch.device, dtype: torch.dtype) -> None:
        # tensors made in inference mode could not be used where gradients flow later
        with torch.inference_mode(False), torch.no_grad():
            for slots in self._slots():
                slots.pack(self.names, self._weights, device, dtype)
        self._packed = device, dtype

    def _pack(self, x: Tensor) -> None:
        """Bring the packed tensors to the input's device and float type, if they are not there."""
        if not torch.compiler.is_compiling() and self._packed != (x.device, x.dtype):
            self._pack_for(x.device, x.dtype)
