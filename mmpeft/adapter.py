"""What training makes: the trained tensors of each layer, and the card that says where they come from.

Layer names are the ones on disk, with the component in front ("unet.mid_block...attn1.to_q"); they outlive the
refactorings of the libraries that hold the live modules.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mmpeft.delta import Delta
from mmpeft.errors import AdapterError
from mmpeft.plugins import near_miss


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


@dataclass(frozen=True)
class AdapterCard:
    """What is known about an adapter besides its weights; written as adapter.json.

    Only digests stand for what lay on the user's machine: no caption, file name or path.
    """

    base: str = ""
    fingerprint: Mapping[str, Any] | None = None
    data_digest: str | None = None
    trigger: str | None = None
    seed: int | None = None
    steps: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    preview: Mapping[str, Any] = field(default_factory=dict)
    embedding: Sequence[float] | None = None
    """mean of the training captions in the base's text encoder, as `mmpeft.routing` makes it; routes prompts"""
    parents: tuple[Mapping[str, Any], ...] = ()


class Adapter(Mapping[str, LayerAdapter]):
    """Layer adapters by layer name, with a card."""

    def __init__(self, layer_adapters: Mapping[str, LayerAdapter], card: AdapterCard | None = None) -> None:
        self._layer_adapters = dict(sorted(layer_adapters.items()))
        self.card = card or AdapterCard()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layer names, sorted, each with its component in front."""
        return tuple(self._layer_adapters)

    @property
    def components(self) -> tuple[str, ...]:
        """The components that have at least one layer here, sorted."""
        return tuple(sorted({name.split(".", 1)[0] for name in self._layer_adapters}))

    def component(self, name: str) -> dict[str, LayerAdapter]:
        """Give one component's layer adapters, their names without the component in front."""
        prefix = name + "."
        return {k.removeprefix(prefix): v for k, v in self._layer_adapters.items() if k.startswith(prefix)}

    @property
    def digest(self) -> str:
        """SHA-256 of layer names, methods, tensors as stored, and alphas; the same in every file format."""
        sha = hashlib.sha256()
        for name, layer in self._layer_adapters.items():
            sha.update(f"{name} {layer.method} {layer.settings}".encode())
            for part, tensor in sorted(layer.tensors.items()):
                sha.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
                sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def __getitem__(self, layer: str) -> LayerAdapter:
        try:
            return self._layer_adapters[layer]
        except KeyError:
            hint = near_miss(layer, list(self.layers)) if len(self) else "; the adapter is empty"
            raise AdapterError(f"the adapter has no layer {layer!r}{hint[:200]}") from None

    def get(self, layer: str, default: Any = None) -> Any:
        """Give a layer's adapter, or the default; the mapping's own would not know our error."""
        return self._layer_adapters.get(layer, default)

    def __contains__(self, layer: object) -> bool:
        return layer in self._layer_adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer_adapters)

    def __len__(self) -> int:
        return len(self._layer_adapters)

    def save(self, folder: str | Path) -> Path:
        """Write the native folder, which plain diffusers and plain PEFT load; see `mmpeft.adapter_file.save`."""
        from mmpeft.adapter_file import save

        return save(self, Path(folder))
