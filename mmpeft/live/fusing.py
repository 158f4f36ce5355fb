"""A mix in the base's weights and out again: rounded once going in, the exact bytes coming out.

What was there before comes back from a copy that is kept, or from the base's file, which costs no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmpeft.errors import BankError, BaseError
from mmpeft.live.branch import Branch, Part

if TYPE_CHECKING:
    from mmpeft.disk.base_files import BaseFiles

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FusionReport(Mapping[str, float]):
    """What fusing lost to rounding, by layer: ‖fused - (W + change)‖ / ‖change‖, 0 for nothing and 1 for all of it.

    Args:
        norms: layer -> (norm of what was lost, norm of the change).
    """

    def __init__(self, norms: Mapping[str, tuple[float, float]]) -> None:
        self._norms = dict(norms)

    @property
    def lost(self) -> float:
        """The share of the whole change, all layers together."""
        lost, change = (sqrt(sum(pair[i] ** 2 for pair in self._norms.values())) for i in (0, 1))
        return _share(lost, change)

    def text(self) -> str:
        """Say it in a line, and in one more for each of the three layers that lost most."""
        worst = sorted(self, key=lambda layer: -self[layer])[:3] if self.lost else []
        lines = [f"{len(self)} layers fused; rounding lost {self.lost:.2%} of the change"]
        return "\n".join(lines + [f"  {self[layer]:.2%} of {layer}" for layer in worst])

    def __getitem__(self, layer: str) -> float:
        return _share(*self._norms[layer])

    def __iter__(self) -> Iterator[str]:
        return iter(self._norms)

    def __len__(self) -> int:
        return len(self._norms)


@dataclass
class _Place:
    """A weight or bias that is changed, and how it comes back."""

    name: str
    module: Any
    part: Part
    before: Tensor | int
    """a copy of what was there, or its digest if the base's file has it"""
    fused: int = 0
    """digest of what was put there"""

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = getattr(self.module, self.part)
        return tensor


class Fusion:
    """What is fused now, and the way back. Made by `fuse`."""

    def __init__(self, base: BaseFiles | None = None) -> None:
        self._places: dict[int, _Place] = {}  # by tensor: two layers may share one
        self._base = base

    @torch.no_grad()
    def add(self, name: str, module: Any, part: Part, changes: Sequence[Tensor]) -> tuple[float, float]:
        """Put a change into a weight: round(float32(W) + change), rounded once.

        Returns:
            The norms of what rounding lost and of the change.
        """
        tensor = getattr(module, part)
        if id(tensor) not in self._places:
            before = tensor.detach().clone() if self._base is None else _digest(tensor)
            self._places[id(tensor)] = _Place(name, module, part, before)
        change = reduce(torch.add, (each.to(tensor.device).reshape(tensor.shape) for each in changes))
        exact = tensor.float() + change
        tensor.copy_(exact)
        self._places[id(tensor)].fused = _digest(tensor)
        return float((tensor.float() - exact).norm()), float(change.norm())

    def check(self, *, lose_edits: bool = False) -> None:
        """Make sure that what was before can come back and nothing else is lost.

        Raises:
            BankError: a weight was changed while fused, the model changed its type, or the file is not what it was.
        """
        for place in self._places.values():
            tensor, expected = place.tensor, place.before
            if isinstance(expected, Tensor) and tensor.dtype != expected.dtype:
                raise BankError(
                    f"the model went from {expected.dtype} to {tensor.dtype} while fused; turn it back to unfuse"
                )
            if not lose_edits and place.fused != _digest(tensor):
                raise BankError(
                    f"{place.name} was changed while the mix was fused (by training, another adapter's merge or a "
                    f"change of type); undo that first, or give it up with unfuse(lose_edits=True)"
                )
        for place in self._places.values():
            self._before(place)

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what was there before, byte for byte."""
        for place in self._places.values():
            place.tensor.copy_(self._before(place))
        self._places.clear()

    def _before(self, place: _Place) -> Tensor:
        if isinstance(place.before, Tensor):
            return place.before
        try:
            for stored in read_stored(self._base, place.name, place.tensor.dtype) if self._base else ():
                if stored.shape == place.tensor.shape and _digest(stored) == place.before:
                    return stored
        except (BaseError, OSError) as error:
            raise BankError(f"cannot unfuse {place.name}: the base's file cannot be read: {error}") from error
        raise BankError(
            f"the base's file no longer has {place.name} as it was fused; put the file back to unfuse"
        )


def fuse(branches: Mapping[str, Branch], base_file: str | Path | None = None) -> tuple[Fusion, FusionReport]:
    """Put the active mix into the weights; if anything fails, nothing is changed.

    Args:
        branches: by layer name.
        base_file: where the base lies, to unfuse from; None keeps copies in memory.

    Raises:
        BankError: weights cannot be changed (quantised, offloaded), or are not those of the base's file.
    """
    places = {
        name if part == "weight" else f"{name}.bias": (branch, part)
        for name, branch in branches.items()
        if branch.is_active
        for part in branch.parts
    }
    for name, (branch, part) in places.items():
        if not branch.is_readable(part):
            raise BankError(f"cannot fuse: the {part} of {name} is quantised or offloaded; mix live instead")
    base = _open(base_file, places) if base_file is not None else None
    fusion, norms = Fusion(base), {}
    try:
        for name, (branch, part) in places.items():
            norms[name] = fusion.add(name, branch.layer, part, branch.changes(part))
    except BaseException:
        fusion.undo()
        raise
    return fusion, FusionReport(norms)


def read_stored(base: BaseFiles, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Read a layer's weight from each of the base's files that has it, in the live model's float type."""
    for slot in base.slots(name):
        yield slot.read().to(dtype)


def _open(base_file: str | Path, places: Mapping[str, tuple[Branch, Part]]) -> BaseFiles:
    from mmpeft.disk.base_files import open_base

    try:
        base = open_base(base_file)
        for name, (branch, part) in places.items():
            live = _bits(getattr(branch.layer, part).cpu())
            stored = list(read_stored(base, name, getattr(branch.layer, part).dtype))
            if not any(each.shape == live.shape and torch.equal(_bits(each), live) for each in stored):
                found = "has other bytes for" if stored else "does not have"
                raise BankError(
                    f"{base.title} {found} {name}, so it cannot be unfused from there; use keep='copy'"
                )
    except (BaseError, OSError) as error:
        raise BankError(f"cannot unfuse from the base's file: {error}; or use keep='copy'") from error
    return base


def _share(lost: float, change: float) -> float:
    return lost / change if change else 0.0


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])


def _digest(tensor: Tensor) -> int:
    """Tell contents apart cheaply: the XOR of all bits, or their sum where torch has no such hash."""
    bits = _bits(tensor)
    if hasattr(torch, "hash_tensor"):
        return int(torch.hash_tensor(bits).view(torch.int64))
    return int(bits.sum(dtype=torch.int64))
