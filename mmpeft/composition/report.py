"""What a composition cost: how far the result is from what the strategy gave, at which ranks, in what time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


class Errors(float):
    """Relative Frobenius errors ‖kept - given‖ / ‖given‖: the number is that of all layers together.

    Args:
        overall: of all layers together.
        layers: of each layer, by name.
    """

    layers: Mapping[str, float]

    def __new__(cls, overall: float, layers: Mapping[str, float]) -> Self:
        """Make a float that also knows its layers."""
        errors = super().__new__(cls, overall)
        errors.layers = dict(layers)
        return errors

    def __getnewargs__(self) -> tuple[float, Mapping[str, float]]:  # type: ignore[override]
        # what copying and pickling call __new__ with
        return float(self), self.layers

    def __getitem__(self, layer: str) -> float:
        return self.layers[layer]

    @classmethod
    def of(cls, losses: Mapping[str, tuple[float, float]]) -> Self:
        """Add up (relative error, norm of what was given) of each layer."""
        given = math.hypot(*(norm for _, norm in losses.values()))
        lost = math.hypot(*(error * norm for error, norm in losses.values()))
        return cls(lost / given if given else 0.0, {name: error for name, (error, _) in losses.items()})

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest error, and that error."""
        return max(self.layers.items(), key=lambda item: item[1])


@dataclass(frozen=True)
class CompositionReport:
    """How a composition went.

    Args:
        strategy: its name.
        adapters: how many were composed.
        error: what truncation lost, against what the strategy gave without it; 0 where nothing was truncated.
        ranks: by layer name; None for a full difference.
        warnings: sentences that a person should read.
        seconds: of work, reading files included.
    """

    strategy: str
    adapters: int
    error: Errors
    ranks: Mapping[str, int | None]
    warnings: tuple[str, ...]
    seconds: float

    def text(self) -> str:
        """Give the report for a terminal."""
        full = sum(rank is None for rank in self.ranks.values())
        counts = Counter(rank for rank in self.ranks.values() if rank is not None)
        kinds = [f"rank {_span(list(counts))} on {sum(counts.values())} layers"] if counts else []
        kinds += [f"full differences on {full} layers"] if full else []
        what = "1 adapter" if self.adapters == 1 else f"{self.adapters} adapters"
        lines = [f"{what} composed by {self.strategy} in {self.seconds:.2f} s: {', '.join(kinds)}"]
        worst, most = self.error.worst
        more = f" (worst: {worst}, {percent(most)})" if most else ""
        lines.append(f"lost by truncation: {percent(self.error)} of the change{more}")
        return "\n".join([*lines, *(f"look at this: {sentence}" for sentence in self.warnings)])

    def as_dict(self) -> dict[str, Any]:
        """Give the report as plain JSON values."""
        return {
            "strategy": self.strategy,
            "adapters": self.adapters,
            "error": float(self.error),
            "layers": {
                name: {"error": self.error[name], "rank": rank} for name, rank in sorted(self.ranks.items())
            },
            "warnings": list(self.warnings),
            "seconds": self.seconds,
        }


def loss_sentence(strategy: str, is_low_rank: bool, at: Mapping[int, Errors]) -> str:
    """Say what truncation lost, and what higher ranks would lose.

    Args:
        is_low_rank: whether the strategy's results are low-rank before truncation.
        at: rank -> the errors at that rank, the one that was asked for first.
    """
    (rank, errors), *higher = at.items()
    worst, most = errors.worst
    said = f"rank {rank} loses {percent(errors)} (worst: {worst}, {percent(most)})"
    said += "".join(f"; rank {more} would lose {percent(lost)}" for more, lost in higher)
    return said if is_low_rank else f"a {strategy} result is not low-rank: {said}"


def percent(share: float) -> str:
    """Write a share as a percentage of two digits."""
    return "0 %" if share < 1e-6 else f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _span(ranks: list[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
