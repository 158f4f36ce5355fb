"""How far apart two adapters are: the distance of what they change, layer by layer, in whatever form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import hypot, inf
from pathlib import Path
from typing import Any

import torch

from mmpeft.adapter import Adapter
from mmpeft.composition.parents import Parents
from mmpeft.delta import Delta, add, inner

_SHOWN = 10
# Two float32 sums of the same products in another order.
_SAME = 1e-5


@dataclass(frozen=True)
class LayerComparison:
    """One layer of both.

    Args:
        norms: the Frobenius norms of both changes.
        distance: ‖Δa - Δb‖ / ‖Δa‖; infinite where a changes nothing and b does.
        cosine: <Δa, Δb> / (‖Δa‖‖Δb‖); 0 where one changes nothing.
    """

    norms: tuple[float, float]
    distance: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """Two adapters beside each other; made by `compare`.

    Args:
        adapters: their names.
        layers: every layer that both have.
        only: by adapter: the layers that the other one lacks.
        distance: over all layers, ‖Δa - Δb‖ / ‖Δa‖; a layer that one lacks counts as a change of 0 there.
        cosine: over all layers.
        warnings: sentences that a person should read.
    """

    adapters: tuple[str, str]
    layers: Mapping[str, LayerComparison]
    only: Mapping[str, tuple[str, ...]]
    distance: float
    cosine: float
    warnings: tuple[str, ...] = ()

    def text(self) -> str:
        """Give the comparison for a terminal, the layers that differ most first."""
        a, b = self.adapters
        verdict = (
            "they do the same" if self.distance <= _SAME else f"{self.distance:.4g} of {a}'s change apart"
        )
        lines = [f"{a} and {b}: {verdict}; cosine {self.cosine:.4f}; {len(self.layers)} layers in both"]
        lines += [f"only in {name}: {_some(layers)}" for name, layers in self.only.items() if layers]
        apart = [(name, layer) for name, layer in self.layers.items() if layer.distance > _SAME]
        far = sorted(apart, key=lambda item: -item[1].distance)[:_SHOWN]
        if far:
            width = max(len(name) for name, _ in far)
            lines += ["", f"{'furthest apart':<{width}}  distance  cosine  norms"]
        for name, layer in far:
            norms = f"{layer.norms[0]:.4g}, {layer.norms[1]:.4g}"
            lines.append(f"{name:<{width}}  {layer.distance:>8.4f}  {layer.cosine:>6.3f}  {norms}")
        return "\n".join([*lines, *(f"look at this: {sentence}" for sentence in self.warnings)])

    def as_dict(self) -> dict[str, Any]:
        """Give the comparison as plain JSON values; an infinite distance is null."""
        return {
            "adapters": list(self.adapters),
            "distance": _finite(self.distance),
            "cosine": self.cosine,
            "layers": {
                name: {
                    **asdict(layer),
                    "norms": list(layer.norms),
                    "distance": _finite(layer.distance),
                }
                for name, layer in self.layers.items()
            },
            "only": {name: list(layers) for name, layers in self.only.items()},
            "warnings": list(self.warnings),
        }


def compare(a: Adapter | str | Path, b: Adapter | str | Path, base: Any = None) -> Comparison:
    """Compare what two adapters change; low-rank changes are never built.

    Args:
        a: an adapter, or the path of what `load_adapter` reads.
        b: another.
        base: the base's folder, pipeline, module, or modules by component; for methods whose change depends on it.

    Raises:
        AdapterError: one cannot be read, or needs the base's weights.
        BaseMismatch: they belong to different bases.
        MethodError: an adapter's method is no change of weights.
    """
    parents = Parents([a, b], base)
    remark = parents.check_bases()
    shared: dict[str, LayerComparison] = {}
    inners, distances, norms = [], [], ([], [])  # type: tuple[list[float], list[float], tuple[list[float], list[float]]]
    with torch.no_grad():
        for layer in parents.layers:
            one, other = parents.delta(0, layer), parents.delta(1, layer)
            each = (one.norm() if one else 0.0, other.norm() if other else 0.0)
            for sums, norm in zip(norms, each, strict=True):
                sums.append(norm)
            if one is None or other is None:
                distances.append(sum(each))
                continue
            product, distance = inner(one, other), _distance(one, other)
            inners.append(product)
            distances.append(distance)
            shared[layer] = LayerComparison(each, _share(distance, each[0]), _cosine(product, *each))
    totals = hypot(*norms[0]), hypot(*norms[1])
    return Comparison(
        adapters=(parents.titles[0], parents.titles[1]),
        layers=shared,
        only={
            title: tuple(layer for layer in parents[n] if layer not in parents[1 - n])
            for n, title in enumerate(parents.titles)
        },
        distance=_share(hypot(*distances), totals[0]),
        cosine=_cosine(sum(inners), *totals),
        warnings=(remark,) if remark else (),
    )


def _distance(one: Delta, other: Delta) -> float:
    return add([one, other.scaled(-1.0)]).norm()


def _share(distance: float, norm: float) -> float:
    return distance / norm if norm else inf if distance else 0.0


def _cosine(product: float, one: float, other: float) -> float:
    return product / (one * other) if one and other else 0.0


def _finite(number: float) -> float | None:
    return None if number == inf else number


def _some(layers: tuple[str, ...]) -> str:
    more = len(layers) - 3
    return ", ".join(layers[:3]) + (f" and {more} more" if more > 0 else "")
