"""Adapter weights as values: how strongly each adapter of a mix counts, and where, when and for whom.

A weight is a number, per component or block, a schedule over the timestep, a mask over the image, per sample of a
batch, for the conditional branch alone, or all of these, which then multiply.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.injection import COMPONENTS, matches

# diffusers' words for the parts of a UNet, as its set_adapters takes them.
_UNET_PARTS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


@dataclass(frozen=True)
class Schedule:
    """A factor over time, piecewise linear between points, constant before the first and after the last.

    Args:
        points: (time, factor) in the order of time; time 0 is noise, 1 is the image.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        try:
            points = tuple((float(time), float(factor)) for time, factor in self.points)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"a schedule is a list of (time, factor), such as [(0, 0), (0.5, 1)]; got {self.points!r}"
            ) from error
        object.__setattr__(self, "points", points)
        times = [time for time, _ in points]
        if not points or times != sorted(times) or not all(0 <= time <= 1 for time in times):
            raise ConfigError(
                f"a schedule's points are (time, factor) with times rising from 0 (noise) to 1 (image); got {points}"
            )
        if not all(math.isfinite(factor) for _, factor in points):
            raise ConfigError(f"a schedule's factors must be finite numbers; got {points}")

    @classmethod
    def window(cls, start: float, end: float) -> Schedule:
        """Count fully from one time to another, not at all outside; the steps are as steep as float32 tells apart.

        Raises:
            ConfigError: `end` is before `start`, or one of them is not from 0 to 1.
        """
        if not 0 <= start <= end <= 1:
            raise ConfigError(
                f"a window goes from a time to a later one, both from 0 to 1; got {start} and {end}"
            )
        edge = 1e-6
        points = [(start - edge, 0.0), (start, 1.0), (end, 1.0), (end + edge, 0.0)]
        return cls(tuple(point for point in points if 0 <= point[0] <= 1))

    def at(self, time: Tensor) -> Tensor:
        """Give the factor at times, any shape, float32 in [0, 1]; made of tensor operations alone."""
        times, factors = time.new_tensor(self.points).unbind(-1)
        return interpolate(time, times, factors)


def interpolate(time: Tensor, times: Tensor, factors: Tensor) -> Tensor:
    """Read piecewise linear functions: the first factor, and of each rise the share that lies before the time.

    Args:
        time: any shape, float32.
        times: (..., points), rising along the last dimension; equal ones are a step, which counts from there on.
        factors: as `times`.

    Returns:
        (*time's shape, *the shape before points), float32.
    """
    width = times.diff(dim=-1)
    passed = time.reshape(*time.shape, *[1] * times.ndim) - times[..., :-1]
    share = torch.where(width > 0, (passed / width.clamp(min=1e-12)).clamp(0, 1), (passed >= 0).float())
    rises: Tensor = share * factors.diff(dim=-1)
    return factors[..., 0] + rises.sum(-1)


class Mask:
    """Where in the image an adapter counts: 1 fully, 0 not at all.

    Args:
        area: (H, W) numbers in [0, 1], or a PIL image (its grey values); resized to every resolution of the model.
    """

    def __init__(self, area: Any) -> None:
        if not isinstance(area, Tensor):
            import numpy as np

            is_image = hasattr(area, "convert")
            try:
                area = torch.as_tensor(np.asarray(area.convert("L") if is_image else area, dtype=np.float32))
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"a mask is (height, width) of numbers, or an opened picture; got {str(area)[:80]!r}"
                ) from error
            area = area / 255 if is_image else area
        area = area.detach().float().cpu().contiguous()
        if area.ndim != 2 or not area.numel():
            raise ConfigError(
                f"a mask is (height, width) of numbers from 0 to 1; got shape {tuple(area.shape)}"
            )
        if not bool(((area >= 0) & (area <= 1)).all()):
            raise ConfigError(
                f"a mask is (height, width) of numbers from 0 to 1; got {float(area.min()):g} to {float(area.max()):g}"
            )
        self.area = area
        self._digest = hashlib.sha256(f"{tuple(area.shape)}".encode() + area.numpy().tobytes()).hexdigest()

    @property
    def is_even(self) -> bool:
        """Whether it is the same everywhere."""
        return bool((self.area == self.area[0, 0]).all())

    def resized(self, height: int, width: int) -> Tensor:
        """Give the mask at another size, (height, width), float32: each entry the mean of the area that it covers."""
        rows = _coverage(self.area.shape[0], height)
        columns = _coverage(self.area.shape[1], width)
        resized: Tensor = rows @ self.area @ columns.T
        return resized

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        height, width = self.area.shape
        return f"Mask({height} x {width}, mean {float(self.area.mean()):.2f})"


def _coverage(before: int, after: int) -> Tensor:
    """Give which share of each new entry is which old one, (after, before), rows that sum to 1."""
    edges = torch.arange(after + 1, dtype=torch.float64) * before / after
    old = torch.arange(before, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], old + 1) - torch.maximum(edges[:-1, None], old)
    return (overlap.clamp(min=0) * after / before).float()


@dataclass(frozen=True)
class Weight:
    """How strongly an adapter counts: the product of all that is given.

    Args:
        value: any finite number.
        blocks: (pattern on layer names with their component, factor), or the mapping that `Weight.of` takes; the last
            that matches a layer counts, a layer that none matches has factor 1.
        schedule: over the timestep; also the points of one.
        mask: over the image; also what `Mask` takes. One that is the same everywhere is only a factor: it goes into
            the value.
        samples: one factor for each prompt of a call.
        conditional_only: count in the conditional branch of classifier-free guidance alone.

    Raises:
        ConfigError: a number that is not finite, or no sample.
    """

    value: float = 1.0
    blocks: tuple[tuple[str, float], ...] = ()
    schedule: Schedule | None = None
    mask: Mask | None = None
    samples: tuple[float, ...] | None = None
    conditional_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _number(self.value))
        given: Any = self.blocks
        pairs = tuple(_blocks(given)) if isinstance(given, Mapping) else given
        object.__setattr__(self, "blocks", tuple((str(p), _number(f)) for p, f in pairs))
        if self.samples is not None:
            if not isinstance(self.samples, Iterable) or not (samples := tuple(self.samples)):
                raise ConfigError(f"weights per sample are one factor for each prompt; got {self.samples!r}")
            object.__setattr__(self, "samples", tuple(_number(s) for s in samples))
        for part, kind in (("schedule", Schedule), ("mask", Mask)):
            value = getattr(self, part)
            if value is not None and not isinstance(value, kind):
                object.__setattr__(self, part, kind(value))
        if self.mask is not None and self.mask.is_even:
            object.__setattr__(self, "value", self.value * float(self.mask.area[0, 0]))
            object.__setattr__(self, "mask", None)

    @classmethod
    def of(cls, weight: float | Mapping[str, Any] | Weight) -> Weight:
        """Understand a number, a Weight, or factors per component and block.

        The mapping is what diffusers' `set_adapters` takes: {"unet": {"down": 0.5, "up": {"block_0": 0.6, "block_1":
        [0.4, 0.8]}}, "text_encoder": 0.2}; what is not named counts fully. Keys may also be beginnings of layer
        names ("transformer_blocks.3") or patterns with * and ?.

        Raises:
            ConfigError: something else.
        """
        if isinstance(weight, Weight):
            return weight
        if isinstance(weight, Mapping):
            return cls(blocks=tuple(_blocks(weight)))
        return cls(_number(weight))

    @property
    def varies(self) -> bool:
        """Whether it depends on the time, the place, the sample or the branch of guidance."""
        return self.conditional_only or any(
            part is not None for part in (self.schedule, self.mask, self.samples)
        )

    def check(self, layers: Iterable[str]) -> None:
        """Refuse blocks that are none of the layers', which are names on disk with the component.

        Raises:
            ConfigError: a component, block or pattern matches no layer.
        """
        layers = list(layers)
        for pattern, _ in self.blocks:
            if not any(_means(pattern, layer) for layer in layers):
                raise ConfigError(f"weights per block: {pattern!r} is no component, block or layer here")

    def at(self, layer: str) -> float:
        """Give the constant part at a layer, by its name on disk with the component: the number times its block's."""
        return self.value * _factor(self.blocks, layer) if self.blocks else self.value


@dataclass(frozen=True)
class Mix:
    """Adapters with their weights, by name; what is not named does not count."""

    weights: Mapping[str, Weight] = field(default_factory=dict)

    @classmethod
    def of(cls, mix: Mapping[str, Any] | Mix | None = None, /, **weights: Any) -> Mix:
        """Understand a mapping of names to whatever `Weight.of` takes; keywords are shorthand for the same.

        Raises:
            ConfigError: no mapping, or a weight that is none.
        """
        named = mix.weights if isinstance(mix, Mix) else {} if mix is None else mix
        if not isinstance(named, Mapping):
            raise ConfigError(f"a mix is adapter names with their weights; got {mix!r}")
        given = {**named, **weights}
        return cls({str(name): _named_weight(str(name), weight) for name, weight in given.items()})

    @classmethod
    def for_prompts(cls, mixes: Sequence[Mapping[str, Any] | Mix]) -> Mix:
        """Make one mix of one for each prompt of a batch: their numbers become weights per sample.

        Args:
            mixes: as `of` takes them, in the order of the prompts; {} is the base alone.

        Raises:
            ConfigError: no mix, or an adapter whose weights differ in more than their numbers.
        """
        if not mixes:
            raise ConfigError("adapters for each prompt: give one mix for each prompt; got none")
        each = [cls.of(mix).weights for mix in mixes]
        return cls({name: _across(name, each) for name in dict.fromkeys(chain.from_iterable(each))})

    def __hash__(self) -> int:
        return hash(frozenset(self.weights.items()))

    def at(self, name: str, layer: str) -> float:
        """Give the constant part of an adapter's weight at a layer; 0 for an adapter that is not named."""
        return self.weights[name].at(layer) if name in self.weights else 0.0


def _named_weight(name: str, weight: Any) -> Weight:
    try:
        return Weight.of(weight)
    except ConfigError as error:
        raise ConfigError(f"the weight of {name!r}: {error}") from error


def _across(name: str, mixes: Sequence[Mapping[str, Weight]]) -> Weight:
    """Join one adapter's weights in the mixes of several prompts."""
    given = [mix[name] for mix in mixes if name in mix]
    alike = {replace(weight, value=1.0) for weight in given}
    if len(alike) > 1 or given[0].samples is not None:
        raise ConfigError(
            f"the weights of {name!r} for different prompts may differ in their numbers alone, not in blocks, "
            f"schedule, mask or branch, and have no samples of their own; got {given}"
        )
    values = tuple(mix[name].value if name in mix else 0.0 for mix in mixes)
    if len(set(values)) == 1:
        return given[0]
    return replace(given[0], value=1.0, samples=values)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigError(f"must be a finite number, or numbers by component or block; got {value!r}")
    return float(value)


@lru_cache(maxsize=65536)
def _factor(blocks: tuple[tuple[str, float], ...], layer: str) -> float:
    hits = [factor for pattern, factor in blocks if _means(pattern, layer)]
    return hits[-1] if hits else 1.0


def _means(pattern: str, layer: str) -> bool:
    return matches(layer, pattern) or matches(layer, f"{pattern}.*")


def _blocks(weight: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in weight.items():
        component, _, rest = str(key).partition(".")
        if not prefix and component in COMPONENTS and not rest and isinstance(value, Mapping):
            yield from _blocks(value, f"{key}.")
        elif key in _UNET_PARTS:
            yield from _unet_part(f"{prefix or '*'}{_UNET_PARTS[key]}", value)
        else:
            yield f"{prefix}{key}", _number(value)


def _unet_part(part: str, value: Any) -> Iterator[tuple[str, float]]:
    if not isinstance(value, Mapping):
        yield from _attentions(part, value)
        return
    for block, factor in value.items():
        number = re.fullmatch(r"block_(\d+)", str(block))
        if number is None:
            raise ConfigError(f"blocks of a UNet's half are called block_0, block_1, ...; got {block!r}")
        yield from _attentions(f"{part}.{number[1]}", factor)


def _attentions(block: str, value: Any) -> Iterator[tuple[str, float]]:
    """Give one factor for a whole block, or one for each of its transformers."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        for number, factor in enumerate(value):
            yield f"{block}.attentions.{number}", _number(factor)
    else:
        yield block, _number(value)
