"""What an adapter holds for one layer, whatever its method; plumbing and key formats know no more of it.

Layer names are the ones on disk, with the component in front ("unet.mid_block...attn1.to_q"); they outlive the
refactorings of the libraries that hold the live modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mmpeft.delta import Delta
from mmpeft.errors import AdapterError, FormatError


class LayerAdapter(ABC):
    """What an adapter holds for one layer: the method's own tensors, with alpha as it was saved.

    Each method has its own subclass beside it, a frozen dataclass.
    """

    method: ClassVar[str]
    needs_weight: ClassVar[bool] = False
    """whether `delta` depends on the base's weight"""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The method's tensors by the names that PEFT gives them ("lora_A", "lora_B", ...)."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes: (out, in) or (out, in, kh, kw)."""

    @property
    def settings(self) -> dict[str, Any]:
        """The numbers beside the tensors that decide what they mean (alpha, ...), sorted by name."""
        return {
            each.name: getattr(self, each.name)
            for each in sorted(fields(self), key=lambda each: each.name)  # type: ignore[arg-type]  # all are dataclasses
            if isinstance(getattr(self, each.name), bool | int | float | str)
        }

    def bound(self, weight: Tensor) -> Self:
        """Give a layer adapter that knows the base's weight, by reference, so that `delta` needs no argument.

        What does not depend on the weight gives itself.
        """
        return self

    def check_finite(self, title: str) -> None:
        """Refuse tensors with numbers that are not finite.

        Args:
            title: what the error calls the layer.

        Raises:
            FormatError: so, with how many they are.
        """
        for part, tensor in self.tensors.items():
            if not torch.isfinite(tensor).all():
                share = 1 - float(torch.isfinite(tensor).float().mean())
                raise FormatError(
                    f"{title} has numbers that are not finite in {part} ({100 * share:.0f} % of them)"
                )

    @abstractmethod
    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give the change of the layer's weight.

        Args:
            weight: the base's weight of this layer, for methods whose change depends on it.

        Raises:
            AdapterError: the method needs the weight and got none.
        """

    def dense(self, weight: Tensor | None = None) -> Tensor:
        """Build the whole change of the weight, in its shape, float32."""
        return self.delta(weight).dense()


@dataclass(frozen=True, eq=False)
class WeightDependent(LayerAdapter):
    """A layer adapter whose change depends on the base's weight.

    Its `shape` has -1 for a side that the tensors do not tell (a gain per output says nothing of the inputs).

    Args:
        base_weight: the base's weight, once `bound`; a reference, and no part of the adapter.
    """

    base_weight: Tensor | None = field(default=None, kw_only=True, compare=False, repr=False)
    needs_weight: ClassVar[bool] = True

    def bound(self, weight: Tensor) -> Self:
        """Give a copy that knows the base's weight, by reference.

        Raises:
            AdapterError: the weight has another shape.
        """
        return replace(self, base_weight=self.weight_for(weight))

    def weight_for(self, weight: Tensor | None) -> Tensor:
        """Give the weight that a change is about: the one given, else the one bound.

        Raises:
            AdapterError: there is none, or it has another shape.
        """
        weight = self.base_weight if weight is None else weight
        if weight is None:
            raise AdapterError(
                f"the change of a {self.method} layer depends on the base's weight; give it, or load the adapter "
                f"with its base"
            )
        if not shapes_agree(self.shape, tuple(weight.shape)):
            raise AdapterError(
                f"this {self.method} layer belongs to a weight {self.shape}; got {tuple(weight.shape)}"
            )
        return weight


def shapes_agree(ours: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Tell whether a layer adapter's shape is a weight's.

    Args:
        ours: may be the flattened matrix (out, in*kh*kw), have a 1x1 kernel on a linear layer's weight, and -1 for a
            side that the adapter does not know.
        weight: the weight's own.
    """
    if len(ours) == 2 < len(weight):
        weight = (weight[0], prod(weight[1:]))
    elif len(weight) == 2 < len(ours) and all(side in (1, -1) for side in ours[2:]):
        ours = ours[:2]
    return len(ours) == len(weight) and all(
        mine in (-1, theirs) for mine, theirs in zip(ours, weight, strict=True)
    )


def by_component(layers: Mapping[str, LayerAdapter]) -> dict[str, dict[str, LayerAdapter]]:
    """Sort layer adapters by component, their names without the component in front.

    Args:
        layers: by layer name with the component in front.

    Returns:
        Component -> layer name -> layer adapter; components sorted, layers in the order in which they were given.
    """
    found: dict[str, dict[str, LayerAdapter]] = {}
    for name, layer in layers.items():
        component, _, disk = name.partition(".")
        found.setdefault(component, {})[disk] = layer
    return dict(sorted(found.items()))
