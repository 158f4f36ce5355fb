"""Adapters that meet: opened, named, checked against each other, and given layer by layer as changes of one shape."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from mmpeft.adapter import Adapter, load_adapter
from mmpeft.backbones.fingerprint import Fingerprint, compare
from mmpeft.base_modules import modules_of
from mmpeft.delta import Delta, Dense, LowRank, Sum
from mmpeft.errors import AdapterError, BaseMismatch, ConfigError, MethodError
from mmpeft.injection import shapes
from mmpeft.layer_adapter import shapes_agree


class Parents(Sequence[Adapter]):
    """The adapters of a composition or a comparison, in the order in which they were given.

    Args:
        adapters: adapters, or paths of what `load_adapter` reads; a mapping gives them names.
        base: what `load_adapter` takes; needed by methods whose change depends on the base's weights.

    Raises:
        ConfigError: one is neither an adapter nor a path.
        AdapterError: a file cannot be read, is empty, or holds numbers that are not finite.
        BaseMismatch: one does not fit `base`.
        MethodError: a method of one is no change of weights.
    """

    def __init__(
        self, adapters: Sequence[Adapter | str | Path] | Mapping[str, Adapter | str | Path], base: Any = None
    ) -> None:
        self._modules = modules_of(base) if base is not None else {}
        self._base_shapes = shapes(self._modules)
        given: list[Any]
        if isinstance(adapters, Mapping):
            self.titles, given = tuple(map(str, adapters)), list(adapters.values())
        else:
            self.titles, given = titles_of(adapters), list(adapters)
        self._adapters = tuple(
            self._opened(adapter, title) for adapter, title in zip(given, self.titles, strict=True)
        )
        for title, adapter in zip(self.titles, self, strict=True):
            _check_methods(title, adapter)

    def __len__(self) -> int:
        return len(self._adapters)

    def __getitem__(self, number: Any) -> Any:
        return self._adapters[number]

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers that any of them has, sorted."""
        return tuple(sorted({layer for adapter in self for layer in adapter}))

    @property
    def known_layers(self) -> frozenset[str]:
        """All layers that weights may go by: those of the adapters and of the base."""
        return frozenset(self.layers) | self._base_shapes.keys()

    def shape(self, layer: str) -> tuple[int, ...]:
        """Give the shape of a layer's weight: the fullest that is known, where some files only tell the matrix.

        Raises:
            BaseMismatch: the adapters disagree.
            AdapterError: none of them tells the whole shape, and there is no base.
        """
        told = {
            title: tuple(adapter[layer].shape)
            for title, adapter in zip(self.titles, self, strict=True)
            if layer in adapter
        }
        whole = [shape for shape in told.values() if -1 not in shape]
        if layer not in self._base_shapes and not whole:
            raise AdapterError(
                f"{next(iter(told))} does not tell the shape of {layer}'s weight; give the base that it was trained on"
            )
        fullest = self._base_shapes.get(layer) or max(whole, key=len)
        for title, shape in told.items():
            if not shapes_agree(shape, fullest):
                other = next((name for name, theirs in told.items() if theirs == fullest), "the base")
                raise BaseMismatch(
                    f"{title} and {other} belong to different bases: {layer} is {shape} in {title} and {fullest} "
                    f"in {other}"
                )
        return fullest

    def delta(self, number: int, layer: str) -> Delta | None:
        """Give what an adapter changes at a layer, in the layer's fullest shape; None where it has no such layer.

        Raises:
            AdapterError: the method needs the base's weight, and there is none.
            FormatError: the layer holds numbers that are not finite.
        """
        title, layers = self.titles[number], self[number]
        if layer not in layers:
            return None
        layer_adapter = layers[layer]
        layer_adapter.check_finite(f"{title}: {layer}")
        try:
            delta = layer_adapter.delta()
        except AdapterError as error:
            raise AdapterError(f"{title}: {layer}: {error}") from error
        return _in_shape(delta, self.shape(layer))

    def check_bases(self) -> str | None:
        """Compare the bases that the cards tell of.

        Returns:
            A sentence where two of them are different fine-tunes of one base; None where they are the same, or unknown.

        Raises:
            BaseMismatch: they cannot share adapters.
        """
        apart: tuple[float, str] | None = None
        for (a, ours), (b, theirs) in combinations(self._fingerprints().items(), 2):
            known = ours.prediction and theirs.prediction
            shared = [layer for layer in ours.layers if layer in theirs.layers]
            verdict = compare(
                Fingerprint(
                    ours.prediction if known else "", {layer: ours.layers[layer] for layer in shared}
                ),
                replace(theirs, prediction=theirs.prediction if known else ""),
            )
            names = [
                f"{self.titles[n]} was trained on {self[n].card.base or 'an unnamed base'}" for n in (a, b)
            ]
            both = " and ".join(names)
            if verdict.kind == "other":
                raise BaseMismatch(f"{both}, which cannot share adapters: {verdict.reason}")
            if verdict.kind == "fine-tune" and verdict.distance > (apart[0] if apart else 0.0):
                apart = (
                    verdict.distance,
                    f"{both}: same shapes and other weights, {verdict.distance:.1%} apart",
                )
        return apart[1] if apart else None

    def _fingerprints(self) -> dict[int, Fingerprint]:
        return {
            number: Fingerprint.from_json(adapter.card.fingerprint)
            for number, adapter in enumerate(self)
            if adapter.card.fingerprint
        }

    def _opened(self, given: Any, title: str) -> Adapter:
        if isinstance(given, str | Path):
            return load_adapter(given, self._modules or None)
        if not isinstance(given, Adapter):
            raise ConfigError(f"an adapter or the path of one is needed; got {type(given).__name__}")
        if not len(given):
            raise AdapterError(f"{title} is empty; it has no layer")
        return given.bound(self._modules, title) if self._modules else given


def titles_of(adapters: Sequence[Any]) -> tuple[str, ...]:
    """Name adapters: paths by the part that tells them apart (runs/ink/adapter: ink), the rest by their places."""
    paths = {
        n: _telling_parts(Path(os.path.normpath(a)))
        for n, a in enumerate(adapters)
        if isinstance(a, str | Path)
    }
    depth = min(map(len, paths.values()), default=1)
    for cut in range(1, depth + 1):
        names = {number: parts[-cut] for number, parts in paths.items()}
        if len(set(names.values())) == len(names):
            break
    else:
        names = {number: str(Path(*parts)) for number, parts in paths.items()}
    # one file given twice is told apart by its place
    again = len(set(names.values())) < len(names)
    return tuple(
        f"adapter {number + 1}"
        if number not in names
        else f"{names[number]} ({number + 1})"
        if again
        else names[number]
        for number in range(len(adapters))
    )


def _telling_parts(path: Path) -> tuple[str, ...]:
    # every run calls its folder so
    return path.parts[:-1] if path.name == "adapter" and len(path.parts) > 1 else path.parts


def _in_shape(delta: Delta, shape: tuple[int, ...]) -> Delta:
    if delta.shape == shape:
        return delta
    if isinstance(delta, LowRank):
        return LowRank(delta.lora_B, delta.lora_A, shape)
    if isinstance(delta, Sum):
        return Sum(tuple(_in_shape(part, shape) for part in delta.parts), shape)
    return Dense(delta.dense().reshape(shape))


def _check_methods(title: str, adapter: Adapter) -> None:
    for layer in {layer.method: layer for layer in adapter.values()}.values():
        try:
            layer.delta()
        except MethodError as error:
            raise MethodError(f"{title}: {error}") from error
        except AdapterError:
            pass  # without its base's weight; of no matter for layers that are not asked for
