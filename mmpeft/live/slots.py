"""Slots: one kind of change of several adapters at one layer, packed into one tensor with a weight for each adapter.

Originals stay in float32 on the CPU: the packed copy can be made anew for any device and float type without loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache, reduce
from math import prod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mmpeft.delta import LowRank

Original = TypeVar("Original", LowRank, Tensor)


class Slots(ABC, Generic[Original]):
    """What all kinds share: the originals by adapter, packing for a device and float type, weights set in place.

    Args:
        is_static: take part whatever the weights, so that a compiled layer needs no other graph for another mix.
        reserved: as many rows are there at least; free ones are zeros.
    """

    counts: bool
    """whether it takes part: the mix has anything here, or with `is_static` any adapter has"""

    def __init__(self, is_static: bool, reserved: int = 0) -> None:
        self._is_static, self._reserved = is_static, reserved
        self._originals: dict[str, Original] = {}
        self._owners = torch.zeros(0, dtype=torch.long)
        self._weights = torch.zeros(0)
        self.counts = False

    @property
    def free(self) -> int:
        """How many rows are reserved and not used."""
        return max(0, self._reserved - sum(map(self._rows_of, self._originals)))

    def remove(self, name: str) -> None:
        """Take an adapter's out, if it has any here; what is packed is old then."""
        self._originals.pop(name, None)

    def matter(self, weights: Mapping[str, float]) -> bool:
        """Tell whether any adapter with a weight has something here."""
        return any(weights.get(name) for name in self._originals)

    def pack(
        self, names: Sequence[str], weights: Mapping[str, float], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Make the packed tensors and the weights.

        Args:
            names: the layer's adapters, in the order in which factors that vary come.
        """
        owners = [names.index(name) for name in self._originals for _ in range(self._rows_of(name))]
        owners += [0] * self.free
        self._owners = torch.tensor(owners, dtype=torch.long).to(device)
        self._weights = torch.zeros(len(owners), device=device, dtype=dtype)
        self._stack(device, dtype)
        self.mix(weights)

    def mix(self, weights: Mapping[str, float]) -> None:
        """Set the weights, in place."""
        self.counts = len(self._weights) > 0 if self._is_static else self.matter(weights)
        if self._originals:
            numbers = tuple(weights.get(name, 0.0) for name in self._originals)
            each = _repeated(numbers, tuple(map(self._rows_of, self._originals)))
            self._weights[: len(each)] = each

    def _rows_of(self, name: str) -> int:
        return 1

    @abstractmethod
    def _stack(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the packed tensors."""

    def _each(self, factors: Tensor | None) -> Tensor:
        """Give each row's weight (n,), or times the factors (..., adapters), (..., n)."""
        return self._weights if factors is None else self._weights * factors.index_select(-1, self._owners)


class Ranks(Slots[LowRank]):
    """Low-rank changes: A_all (R, in) or (R, in, kh, kw), B_all (out, R), and a weight for each rank.

    Args:
        shape: the weight's shape.
        reserved: as many ranks are there at least, and all take part. None: as many as the adapters have, and those
            from the first that counts to the last take part.
    """

    def __init__(self, shape: tuple[int, ...], reserved: int | None) -> None:
        super().__init__(reserved is not None, reserved or 0)
        self._shape = shape
        self._span = slice(0, 0)
        self.A_all, self.B_all = torch.zeros(0, *shape[1:]), torch.zeros(shape[0], 0)

    def put(self, name: str, delta: LowRank) -> None:
        """Add an adapter's factors; what is packed is old then."""
        self._originals[name] = LowRank(delta.lora_B.cpu(), delta.lora_A.cpu(), self._shape)

    def mix(self, weights: Mapping[str, float]) -> None:
        """Set the weights, in place."""
        super().mix(weights)
        if self._is_static:
            self._span = slice(0, len(self._weights))
            return
        end, ends = 0, []
        for name, delta in self._originals.items():
            end += delta.rank
            if weights.get(name):
                ends += [end - delta.rank, end]
        self._span = slice(ends[0], ends[-1]) if ends else slice(0, 0)

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

    def _rows_of(self, name: str) -> int:
        return self._originals[name].rank

    def _stack(self, device: torch.device, dtype: torch.dtype) -> None:
        parts = list(self._originals.values())
        A = [part.lora_A for part in parts] + [torch.zeros(self.free, prod(self._shape[1:]))]
        B = [part.lora_B for part in parts] + [torch.zeros(self._shape[0], self.free)]
        self.A_all = torch.cat(A).to(device, dtype).reshape(-1, *self._shape[1:])
        self.B_all = torch.cat(B, 1).to(device, dtype)


class Vectors(Slots[Tensor]):
    """Changes that are a vector (size,) each: gains, biases. Packed (n, size)."""

    def __init__(self, is_static: bool) -> None:
        super().__init__(is_static)
        self._rows = torch.zeros(0, 0)

    def put(self, name: str, vector: Tensor) -> None:
        """Add an adapter's vector; what is packed is old then."""
        self._originals[name] = vector.detach().float().cpu()

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


class Wholes(Slots[Tensor]):
    """Changes of every entry of a weight; their sum is packed, and each alone where factors vary."""

    def __init__(self, shape: tuple[int, ...], is_static: bool) -> None:
        super().__init__(is_static)
        self._shape = shape
        self._mixed: dict[str, float] = {}
        self._place: tuple[torch.device, torch.dtype] = (torch.device("cpu"), torch.float32)
        self._sum: Tensor | None = None
        self._alone: dict[str, Tensor] = {}

    def put(self, name: str, change: Tensor) -> None:
        """Add an adapter's change; what is packed is old then."""
        self._originals[name] = change.detach().float().cpu().reshape(self._shape)

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
        pairs = zip(self._originals, self._each(factors).unbind(-1), strict=True)
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


@lru_cache(maxsize=256)
def _repeated(numbers: tuple[float, ...], counts: tuple[int, ...]) -> Tensor:
    """Give each number as often as counted; layers share it, as most of them have the same adapters and ranks."""
    return torch.tensor(numbers).repeat_interleave(torch.tensor(counts))
