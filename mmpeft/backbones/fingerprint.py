"""How a base is known again: a sketch of some layers' weights that half-precision copies share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from mmpeft.errors import BaseMismatch, FormatError
from mmpeft.randomness import normal

_PROJECTIONS = 8
# Rounding to bfloat16 moves a weight by at most 2^-9 of itself, by 0.001 on average; training moves it by more.
_SAME = 0.003


@dataclass(frozen=True)
class LayerSketch:
    """One layer's weight in nine numbers.

    Args:
        shape: the weight's shape.
        norm: its Frobenius norm.
        projections: eight u'Wv with seeded standard normal u and v. The expected square of one is the squared norm,
            and that of a difference of two is the squared norm of the weights' difference.
    """

    shape: tuple[int, ...]
    norm: float
    projections: tuple[float, ...]


@dataclass(frozen=True)
class FingerprintMatch:
    """How two bases compare.

    Args:
        kind: same (up to half precision), fine-tune (same shapes, other weights), or other (cannot share adapters).
        distance: norm of the weights' difference over the weights' norm, estimated; infinite for other.
        reason: for other, what differs, in words.
    """

    kind: Literal["same", "fine-tune", "other"]
    distance: float
    reason: str = ""

    def judge(self, title: str, trained_on: str, here: str, *, strict: bool) -> str | None:
        """Say what it means for an adapter that was trained on the one base and shall be used on the other.

        Args:
            title: the adapter's.
            trained_on: the name of its base; "" if unknown.
            here: what to call the other base.
            strict: refuse a fine-tune.

        Returns:
            A sentence to warn with where the other is a fine-tune; None where it is the same.

        Raises:
            BaseMismatch: the other cannot carry the adapter, or is a fine-tune and that is refused.
        """
        bases = f"{title} was trained on {trained_on or 'another base'}"
        if self.kind == "other":
            raise BaseMismatch(f"{bases}, which {here} is not: {self.reason}")
        if self.kind == "same":
            return None
        sentence = f"{bases}; {here} has the same shapes and other weights, {self.distance:.1%} apart"
        if strict:
            raise BaseMismatch(f"{sentence}, and strict_base refuses that")
        return f"{sentence}; it will work the better, the closer they are"


@dataclass(frozen=True)
class Fingerprint:
    """Sketches of layers by name on disk, with the component in front.

    Args:
        prediction: what the denoiser predicts; "" where that has no meaning.
    """

    prediction: str
    layers: Mapping[str, LayerSketch]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], prediction: str) -> Self:
        """Sketch weights, each of any float type and of 2 or 4 dimensions, by layer name on disk."""
        return cls(prediction, {name: _sketch(name, weight) for name, weight in sorted(weights.items())})

    def to_json(self) -> dict[str, Any]:
        """Give plain JSON values: nine numbers of six digits per layer."""
        layers = {
            name: [list(s.shape), _rounded(s.norm), [_rounded(p) for p in s.projections]]
            for name, s in self.layers.items()
        }
        return {"prediction": self.prediction, "layers": layers}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave.

        Raises:
            FormatError: it is something else.
        """
        try:
            layers = {
                name: LayerSketch(tuple(map(int, shape)), float(norm), tuple(map(float, projections)))
                for name, (shape, norm, projections) in data["layers"].items()
            }
            return cls(str(data["prediction"]), layers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"this is no base fingerprint: {error!r}") from error


def compare(ours: Fingerprint, theirs: Fingerprint) -> FingerprintMatch:
    """Judge whether two bases are the same, on the layers that `ours` names.

    Args:
        ours: of the base that an adapter was trained on.
        theirs: of the base that it shall be used on; may have more layers.
    """
    if ours.prediction != theirs.prediction:
        return _other(f"one predicts {ours.prediction}, the other {theirs.prediction}")
    missing = [name for name in ours.layers if name not in theirs.layers]
    if missing:
        return _other(f"{len(missing)} of {len(ours.layers)} layers are not there, the first is {missing[0]}")
    pairs = [(name, sketch, theirs.layers[name]) for name, sketch in ours.layers.items()]
    differing = [(name, a.shape, b.shape) for name, a, b in pairs if a.shape != b.shape]
    if differing:
        name, a_shape, b_shape = differing[0]
        return _other(
            f"{len(differing)} of {len(pairs)} layers have other shapes, the first is {name}: "
            f"{a_shape} and {b_shape}"
        )
    difference = sum(
        sum((p - q) ** 2 for p, q in zip(a.projections, b.projections, strict=True)) / len(a.projections)
        for _, a, b in pairs
    )
    total = sum((a.norm**2 + b.norm**2) / 2 for _, a, b in pairs)
    distance = math.sqrt(difference / total) if total else 0.0
    return FingerprintMatch("same" if distance <= _SAME else "fine-tune", distance)


def _other(reason: str) -> FingerprintMatch:
    return FingerprintMatch("other", math.inf, reason)


@torch.no_grad()
def _sketch(name: str, weight: Tensor) -> LayerSketch:
    matrix = weight.detach().flatten(1).to("cpu", torch.float32)
    rows, columns = matrix.shape
    left = normal((_PROJECTIONS, rows), 0, "fingerprint", name, "left")
    right = normal((_PROJECTIONS, columns), 0, "fingerprint", name, "right")
    projections = ((left @ matrix) * right).sum(1)
    return LayerSketch(tuple(weight.shape), float(matrix.norm()), tuple(projections.tolist()))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
