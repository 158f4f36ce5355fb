"""Changes fused into the weights of a base's files: found, checked, rounded once, and what rounding lost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmpeft.adapter import Adapter
from mmpeft.delta import Delta, add
from mmpeft.disk.base_files import BaseFiles, Slot
from mmpeft.disk.weights_stream import FLOAT_TYPES, WeightsFile
from mmpeft.errors import AdapterError, BaseError, BaseMismatch, MethodError
from mmpeft.layer_adapter import LayerAdapter, shapes_agree
from mmpeft.mix import Weight

_CHUNK = 1 << 20  # numbers that are fused at once


@dataclass(frozen=True)
class Ingredient:
    """One adapter of a mix, its title for messages, and its weight, which does not vary."""

    title: str
    adapter: Adapter
    weight: Weight


@dataclass(frozen=True)
class Change:
    """What one adapter does to one weight."""

    layer: str
    title: str
    layer_adapter: LayerAdapter
    factor: float

    def delta(self, weight: Tensor) -> Delta:
        """Give the weighted change.

        Args:
            weight: the base's, in the file's type.

        Raises:
            MethodError: the method is no change of weights.
        """
        try:
            return self.layer_adapter.delta(weight if self.layer_adapter.needs_weight else None).scaled(
                self.factor
            )
        except (MethodError, AdapterError) as error:
            raise type(error)(f"{self.title}: {self.layer}: {error}") from error


# A slot has several changes when adapters share a layer, or layers a weight.
Changes = Mapping[Slot, Sequence[Change]]


def find_changes(base: BaseFiles, ingredients: Sequence[Ingredient]) -> Changes:
    """Find every layer of a mix in a base's files, whose shapes must fit.

    Raises:
        BaseMismatch: a layer is not there, or has another shape.
        BaseError: a weight that would change is quantised.
    """
    changes: dict[Slot, list[Change]] = defaultdict(list)
    for each in ingredients:
        problems = [f for layer in each.adapter if (f := _misfit(base, layer, each.adapter[layer]))]
        if problems:
            trained_on = f" was trained on {each.adapter.card.base} and" if each.adapter.card.base else ""
            raise BaseMismatch(
                f"{each.title}{trained_on} does not fit {base.title}: {len(each.adapter) - len(problems)} of "
                f"{len(each.adapter)} layers match; {problems[0]}"
            )
        for layer, layer_adapter in each.adapter.items():
            factor = each.weight.at(layer)
            for slot in base.slots(layer) if factor else ():
                _refuse_quantised(base, layer, slot)
                changes[slot].append(Change(layer, each.title, layer_adapter, factor))
    return dict(changes)


@dataclass(frozen=True)
class Losses:
    """What rounding lost, layer by layer, as it is found.

    Args:
        layers: layer -> (share of its change, norm of its change); of a weight that lies there in several types, the
            one that lost most.
    """

    layers: dict[str, tuple[float, float]]

    def note(self, layers: Sequence[str], lost: float, norm: float) -> None:
        """Note a weight's loss for the layers that share it."""
        share = lost / norm if norm else 0.0
        for layer in layers:
            self.layers[layer] = max(self.layers.get(layer, (0.0, 0.0)), (share, norm))


def rewritten(file: WeightsFile, changes: Changes, losses: Losses) -> dict[str, partial[None]]:
    """Give, for each tensor of a file that changes, what changes it in place, as `WeightsFile.rewrite` takes it."""
    slots: dict[str, list[Slot]] = defaultdict(list)
    for slot in changes:
        if slot.file is file:
            slots[slot.place.key].append(slot)
    return {key: partial(_change_tensor, each, changes, losses) for key, each in slots.items()}


def _change_tensor(slots: Sequence[Slot], changes: Changes, losses: Losses, tensor: Tensor) -> None:
    for slot in slots:
        names = sorted({change.layer for change in changes[slot]})
        lost, norm = fuse(slot.within(tensor), changes[slot])
        losses.note(names, lost, norm)


@torch.no_grad()
def fuse(weight: Tensor, changes: Sequence[Change]) -> tuple[float, float]:
    """Change a weight in place to round(float32(W) + sum of the changes), rounded once to its own type.

    A float64 weight is summed in float64.

    Returns:
        The norms of what rounding lost and of the change.

    Raises:
        MethodError: a method is no change of weights, or the result would not be finite.
    """
    change = add([change.delta(weight) for change in changes]).dense().reshape(weight.shape)
    lost = norm = 0.0
    # elementwise from here: rows at a time, so that only the change itself is held in float32
    rows = max(1, _CHUNK * len(weight) // max(1, weight.numel()))
    for part, more in zip(weight.split(rows), change.split(rows), strict=True):
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        fused = (wide + more).to(part.dtype)
        if not torch.isfinite(fused).all():
            kind = str(part.dtype).removeprefix("torch.")
            raise MethodError(
                f"{changes[0].layer} would hold numbers that are not finite in {kind}; try smaller adapter weights, "
                f"and look whether the base is whole"
            )
        missed = fused.to(wide.dtype) - wide - more
        lost += float(torch.linalg.vector_norm(missed, dtype=torch.float64)) ** 2
        norm += float(torch.linalg.vector_norm(more, dtype=torch.float64)) ** 2
        part.copy_(fused)
    return math.sqrt(lost), math.sqrt(norm)


def _misfit(base: BaseFiles, layer: str, layer_adapter: LayerAdapter) -> str | None:
    slots = base.slots(layer)
    if not slots:
        return f"there is no {layer} in its files"
    ours = tuple(layer_adapter.shape)
    wrong = [slot.shape for slot in slots if slot.dtype in FLOAT_TYPES and not shapes_agree(ours, slot.shape)]
    return f"{layer} has weight {wrong[0]}, the adapter's is {ours}" if wrong else None


def _refuse_quantised(base: BaseFiles, layer: str, slot: Slot) -> None:
    how = base.quantised.get(layer.partition(".")[0])
    if how is None and slot.dtype not in FLOAT_TYPES:
        how = slot.dtype
    if how is not None:
        raise BaseError(
            f"{base.title} is quantised ({how}), and a change would be lost in its steps: {layer} cannot be baked; "
            f"bake into the base that it was made from"
        )
