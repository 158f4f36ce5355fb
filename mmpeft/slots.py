"""Slots: one kind of change of several adapters at one layer, packed into one tensor with a weight for each adapter.

Originals stay in float32 on the CPU: the packed copy can be made anew for any device and float type without loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from mmpeft.delta import LowRank


class Slots(ABC):
    """What all kinds share: packing for a device and float type, and weights that change in place."""

    counts: bool
    """whether the mix has anything here; with `is_static`, whether any adapter has"""

    def __init__(self, is_static: bool) -> None:
        self._is_static = is_static
        self._owners = torch.zeros(0, dtype=torch.long)
        self._weights = torch.zeros(0)
        self.counts = False

    @property
    @abstractmethod
    def owners(self) -> Sequence[str]:
        """The adapter that each packed row belongs to; "" for a row that is free."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Take an adapter's out, if it has any here; what is packed is old then."""

    @abstractmethod
    def _stack(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the packed tensors."""

    def matter(self, weights: Mapping[str, float]) -> bool:
        """Tell whether any adapter with a weight has something here."""
        return any(weights.get(owner) for owner in self.owners)

    def pack(
        self, names: Sequence[str], weights: Mapping[str, float], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Make the packed tensors and the weights.

        Args:
            names: the layer's adapters, in the order in which factors that vary come.
        """
        place = {name: i for i, name in enumerate(names)}
        self._owners = torch.tensor([place.get(owner, 0) for owner in self.owners], dtype=torch.long).to(
            device
        )
        self._weights = torch.zeros(len(self.owners), device=device, dtype=dtype)
        self._stack(device, dtype)
        self.mix(weights)

    def mix(self, weights: Mapping[str, float]) -> None:
        """Set the weights, in place."""
        numbers = [weights.get(owner, 0.0) for owner in self.owners]
        self.counts = bool(numbers) if self._is_static else self.matter(weights)
        if numbers:
            self._weights.copy_(torch.tensor(numbers))

    def _each(self, factors: Tensor | None) -> Tensor:
        """Give each row's weight (n,), or times the factors (..., adapters), (..., n)."""
        return self._weights if factors is None else self._weights * factors.index_select(-1, self._owners)


class Ranks(Slots):
    """Low-rank changes: A_all (R, in) or (R, in, kh, kw), B_all (out, R), and a weight for each rank.

    Args:
        shape: the weight's shape.
        reserved: as many ranks are there at least; free ones are zeros. None: as many as there are, and only those
            from the first that counts to the last take part.
    """

    def __init__(self, shape: tuple[int, ...], reserved: int | None) -> None:
        super().__init__(is_static=reserved is not None)
        self._shape, self._reserved = shape, reserved or 0
        self._originals: dict[str, LowRank] = {}
        self._span = slice(0, 0)
        self.A_all, self.B_all = torch.zeros(0, *shape[1:]), torch.zeros(shape[0], 0)

    @property
    def owners(self) -> Sequence[str]:
        """The adapter that each rank belongs to; "" for a free one."""
        used = [name for name, delta in self._originals.items() for _ in range(delta.rank)]
        return used + [""] * (self._reserved - len(used))

    def put(self, name: str, delta: LowRank) -> None:
        """Add an adapter's factors; what is packed is old then."""
        self._originals[name] = LowRank(delta.lora_B.cpu(), delta.lora_A.cpu(), self._shape)

    def remove(self, name: str) -> None:
        """Take an adapter's factors out, if it has any."""
        self._originals.pop(name, None)

    def mix(self, weights: Mapping[str, float]) -> None:
        """Set the weights, in place."""
        super().mix(weights)
        owners = self.owners
        active = (
            range(len(owners)) if self._is_static else [i for i, o in enumerate(owners) if weights.get(o)]
        )
        self._span = slice(active[0], active[-1] + 1) if active else slice(0, 0)

    def active(self, factors: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Give A (R, in...), B (out, R) and the weights (R,), or (..., R) with factors (..., adapters), that count."""
        each = self._each(factors)
        return self.A_all[self._span], self.B_all[:, self._span], each[..., self._span]

    @property
    def count(self) -> int:
        """How many ranks count now."""
        return self._span.stop - self._span.start

    def change(self, weights: Mapping[str, float]) -> list[Tensor]:
        """Build the weighted sum in the weight's shape, float32; empty if nothing counts."""
        parts = [delta.scaled(weights[n]) for n, delta in self._originals.items() if weights.get(n)]
        if not parts:
            return []
        B, A = torch.cat([p.lora_B for p in parts], 1), torch.cat([p.lora_A for p in parts])
        return [(B @ A).reshape(self._shape)]

    def _stack(self, device: torch.device, dtype: torch.dtype) -> None:
        ranks, inputs = len(self.owners), prod(self._shape[1:])
        A, B = torch.zeros(ranks, inputs), torch.zeros(self._shape[0], ranks)
        parts = list(self._originals.values())
        used = sum(part.rank for part in parts)
        if parts:
            A[:used] = torch.cat([part.lora_A for part in parts])
            B[:, :used] = torch.cat([part.lora_B for part in parts], 1)
        self.A_all = A.to(device, dtype).reshape(ranks, *self._shape[1:])
        self.B_all = B.to(device, dtype)


class Vectors(Slots):
    """Changes that are a vector (size,) each: gains, biases. Packed (n, size)."""

    def __init__(self, is_static: bool) -> None:
        super().__init__(is_static)
        self._originals: dict[str, Tensor] = {}
        self._rows = torch.zeros(0, 0)

    @property
    def owners(self) -> Sequence[str]:
        """The adapter that each vector belongs to."""
        return tuple(self._originals)

    def put(self, name: str, vector: Tensor) -> None:
        """Add an adapter's vector; what is packed is old then."""
        self._originals[name] = vector.detach().float().cpu()

    def remove(self, name: str) -> None:
        """Take an adapter's vector out, if it has any."""
        self._originals.pop(name, None)

    def sum(self, factors: Tensor | None = None) -> Tensor:
        """Give the weighted sum (size,), or with factors (..., adapters) one for each place, (..., size)."""
        return self._each(factors) @ self._rows

    def each(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Give each vector (size,) with its weight times its factor, (...)."""
        return list(zip(self._rows, self._each(factors).unbind(-1), strict=True))

    def change(self, weights: Mapping[str, float]) -> list[Tensor]:
        """Build the weighted sum, float32; empty if nothing counts."""
        return _weighted(self._originals, weights)

    def _stack(self, device: torch.device, dtype: torch.dtype) -> None:
        rows = list(self._originals.values())
        self._rows = torch.stack(rows).to(device, dtype) if rows else self._rows


class Wholes(Slots):
    """Changes of every entry of a weight; their sum is packed, and each alone where factors vary."""

    def __init__(self, shape: tuple[int, ...], is_static: bool) -> None:
        super().__init__(is_static)
        self._shape = shape
        self._originals: dict[str, Tensor] = {}
        self._mixed: dict[str, float] = {}
        self._place: tuple[torch.device, torch.dtype] = (torch.device("cpu"), torch.float32)
        self._sum: Tensor | None = None
        self._alone: dict[str, Tensor] = {}

    @property
    def owners(self) -> Sequence[str]:
        """The adapter that each change belongs to."""
        return tuple(self._originals)

    def put(self, name: str, change: Tensor) -> None:
        """Add an adapter's change; what is packed is old then."""
        self._originals[name] = change.detach().float().cpu().reshape(self._shape)

    def remove(self, name: str) -> None:
        """Take an adapter's change out, if it has any."""
        self._originals.pop(name, None)

    def mix(self, weights: Mapping[str, float]) -> None:
        """Set the weights; the sum is built when it is asked for, or at once with `is_static`."""
        super().mix(weights)
        self._mixed = {name: weights.get(name, 0.0) for name in self._originals}
        self._sum = self._build() if self._is_static and self._originals else None

    def sum(self) -> Tensor:
        """Give the weighted sum in the weight's shape."""
        if self._sum is None:
            self._sum = self._build()
        return self._sum

    def each(self, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Give each change that counts with its weight times its factor, (...)."""
        pairs = zip(self.owners, self._each(factors).unbind(-1), strict=True)
        counting = [(name, factor) for name, factor in pairs if self._mixed[name]]
        for name, _ in counting:
            if name not in self._alone:
                self._alone[name] = self._originals[name].to(*self._place)
        return [(self._alone[name], factor) for name, factor in counting]

    def _build(self) -> Tensor:
        # tensors made in inference mode could not be used where gradients flow later
        with torch.inference_mode(False), torch.no_grad():
            parts = self.change(self._mixed) or [torch.zeros(self._shape)]
            return parts[0].to(*self._place)

    def change(self, weights: Mapping[str, float]) -> list[Tensor]:
        """Build the weighted sum, float32; empty if nothing counts."""
        return _weighted(self._originals, weights)

    def _stack(self, device: torch.device, dtype: torch.dtype) -> None:
        self._place = device, dtype
        self._alone.clear()


def _weighted(originals: Mapping[str, Tensor], weights: Mapping[str, float]) -> list[Tensor]:
    parts = [change * weights[name] for name, change in originals.items() if weights.get(name)]
    return [reduce(torch.add, parts)] if parts else []
