"""What adapters will do to each other, before they are composed: shared directions, opposing signs, strengths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, groupby
from math import hypot, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmpeft import low_rank
from mmpeft.adapter import Adapter
from mmpeft.composition.parents import Parents
from mmpeft.delta import Delta, LowRank, decompose, inner
from mmpeft.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

# Of a change that is not low-rank: the directions that hold 99 % of its energy, a relative error of 0.1.
_ERROR_OF_SPACES = 0.1
_SHOWN = 5
# Sign conflict beyond what layers of a few thousand entries have by chance.
_FIGHT = 0.55
_LEGEND = (
    "norms: of both changes; cosine: 1 same direction, -1 opposite; conflict: share of what meets in entries of\n"
    "opposite sign, 0.5 by chance; outputs, inputs: how far the spaces that they write and read coincide, and (what\n"
    "random spaces would have)"
)


@dataclass(frozen=True)
class Meeting:
    """Two adapters at one layer, or at several, then as means weighted by the energy ‖a‖‖b‖ of each.

    Args:
        layer: its name, or the name of a block.
        pair: the adapters' names.
        norms: the Frobenius norms of both changes.
        cosine: <a, b> / (‖a‖‖b‖); 1 the same direction, 0 unrelated, -1 opposite.
        sign_conflict: the share of Σ|a_i b_i| that lies in entries where the two have opposite signs: 0 they never
            disagree, 0.5 as unrelated changes do, 1 always. The same whatever positive weights they are mixed with.
        output_overlap: mean squared cosine of the principal angles between the spaces of outputs that they write: 0
            never the same, 1 one lies in the other. None for vectors (biases, norms' gains).
        input_overlap: the same for the inputs that they read.
        output_chance: what random spaces of the same dimensions would have, on average.
        input_chance: the same for inputs.
    """

    layer: str
    pair: tuple[str, str]
    norms: tuple[float, float]
    cosine: float
    sign_conflict: float
    output_overlap: float | None
    input_overlap: float | None
    output_chance: float | None
    input_chance: float | None

    @property
    def energy(self) -> float:
        """How much there is to interfere: the product of both norms."""
        return self.norms[0] * self.norms[1]

    @property
    def relative_norm(self) -> float:
        """The second adapter's norm over the first's; infinite where the first changes nothing."""
        return self.norms[1] / self.norms[0] if self.norms[0] else float("inf")


@dataclass(frozen=True)
class Interference:
    """How adapters meet, pair by pair and layer by layer; made by `interference`.

    Args:
        adapters: their names.
        meetings: every layer of every pair that both adapters have.
        alone: by adapter: how many of its layers no other one has.
        warnings: sentences that a person should read.
    """

    adapters: tuple[str, ...]
    meetings: tuple[Meeting, ...]
    alone: Mapping[str, int]
    warnings: tuple[str, ...] = ()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """All pairs of adapters."""
        return tuple(combinations(self.adapters, 2))

    def of(self, pair: tuple[str, str]) -> list[Meeting]:
        """Give the meetings of a pair, in the order of the layers' names."""
        return [meeting for meeting in self.meetings if meeting.pair == pair]

    def overall(self, pair: tuple[str, str]) -> Meeting:
        """Give the energy-weighted means of a pair over all layers that they share."""
        return _merged("all layers", pair, self.of(pair))

    def blocks(self, pair: tuple[str, str]) -> list[Meeting]:
        """Give the energy-weighted means of a pair for each block of the model."""
        named = groupby(sorted(self.of(pair), key=lambda m: _place(m.layer)), key=lambda m: _block(m.layer))
        return [_merged(block, pair, meetings) for block, meetings in named]

    def table(self) -> str:
        """Give every layer of every pair as text."""
        return "\n\n".join(
            _table(f"{a} and {b}", [*self.of((a, b)), self.overall((a, b))]) for a, b in self.pairs
        )

    def text(self) -> str:
        """Give the blocks of every pair for a terminal, and the layers that disagree most."""
        parts = []
        for pair in self.pairs:
            parts.append(_table(" and ".join(pair), [*self.blocks(pair), self.overall(pair)]))
            fights = sorted(self.of(pair), key=lambda m: m.energy * (m.sign_conflict - 0.5), reverse=True)
            worst = [m for m in fights[:_SHOWN] if m.sign_conflict > _FIGHT]
            if worst:
                shares = (f"  {m.layer} (conflict {m.sign_conflict:.2f})" for m in worst)
                parts.append("\n".join(["where they work against each other most:", *shares]))
        lonely = [f"{count} layers only in {name}" for name, count in self.alone.items() if count]
        notes = [*(f"look at this: {sentence}" for sentence in self.warnings), ", ".join(lonely), _LEGEND]
        return "\n\n".join([*parts, "\n".join(filter(None, notes))])

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain JSON values."""
        return {
            "adapters": list(self.adapters),
            "pairs": [
                {
                    "adapters": list(pair),
                    "overall": _plain(self.overall(pair)),
                    "layers": {meeting.layer: _plain(meeting) for meeting in self.of(pair)},
                }
                for pair in self.pairs
            ],
            "alone": dict(self.alone),
            "warnings": list(self.warnings),
        }

    def picture(self) -> Image.Image:
        """Draw the blocks of the model against the measures of every pair, an RGB heat map."""
        from mmpeft.composition.heat_map import Column, heat_map

        columns = []
        for pair in self.pairs:
            rows = {meeting.layer: meeting for meeting in [*self.blocks(pair), self.overall(pair)]}
            title = " and ".join(pair)
            columns += [
                Column(title, "cosine", {n: (m.cosine, m.cosine) for n, m in rows.items()}),
                Column(
                    title,
                    "sign conflict",
                    {n: (m.sign_conflict, 1 - 2 * m.sign_conflict) for n, m in rows.items()},
                ),
                Column(
                    title, "outputs shared", _excess(rows, "output_overlap", "output_chance"), is_signed=False
                ),
                Column(
                    title, "inputs shared", _excess(rows, "input_overlap", "input_chance"), is_signed=False
                ),
            ]
        return heat_map(
            columns, "orange: against each other, blue: together; violet: shared beyond what chance gives"
        )


Given = Sequence[Adapter | str | Path] | Mapping[str, Adapter | str | Path]


def interference(adapters: Given, base: Any = None) -> Interference:
    """Measure how adapters would interfere, layer by layer, for all pairs.

    Spaces and cosines of low-rank changes come from their factors; signs need every entry, one layer at a time. Of a
    change that is not low-rank, the spaces are those that hold 99 % of its energy.

    Args:
        adapters: at least two adapters, or paths of what `load_adapter` reads; or a mapping of them by the names that
            the result calls them by.
        base: the base's folder, pipeline, module, or modules by component; for methods whose change depends on it.

    Raises:
        ConfigError: fewer than two adapters, or something else.
        AdapterError: one cannot be read, or needs the base's weights.
        BaseMismatch: they belong to different bases.
        MethodError: an adapter's method is no change of weights.
    """
    if isinstance(adapters, Adapter | str | Path):
        raise ConfigError(
            "interference is between adapters: give a list of at least two, or a mapping by names"
        )
    if len(adapters) < 2:
        raise ConfigError(f"interference is between adapters: give at least two; got {len(adapters)}")
    parents = Parents(adapters, base)
    remarks = [sentence for sentence in [parents.check_bases()] if sentence]
    meetings: list[Meeting] = []
    with torch.no_grad():
        for layer in parents.layers:
            changes = [
                (parents.titles[number], _Change(delta))
                for number in range(len(parents))
                if (delta := parents.delta(number, layer)) is not None
            ]
            meetings += [_meeting(layer, one, other) for one, other in combinations(changes, 2)]
    alone = {
        title: sum(all(layer not in other for other in parents if other is not adapter) for layer in adapter)
        for title, adapter in zip(parents.titles, parents, strict=True)
    }
    met = {meeting.pair for meeting in meetings}
    remarks += [
        f"{a} and {b} change no layer in common, so nothing can interfere"
        for a, b in combinations(parents.titles, 2)
        if (a, b) not in met
    ]
    return Interference(parents.titles, tuple(meetings), alone, tuple(remarks))


class _Change:
    """One adapter's change of one layer, with what every pair asks of it."""

    def __init__(self, delta: Delta) -> None:
        self.delta = delta
        self.norm = delta.norm()
        self.dense: Tensor = delta.dense()
        self.spaces: tuple[Tensor, Tensor] | None = None
        if len(delta.shape) > 1:
            U, S, Vh = decompose(delta)
            if isinstance(delta, LowRank):
                kept = low_rank.numerical_rank(S)
            else:
                kept = int((low_rank.relative_errors(S) > _ERROR_OF_SPACES).sum()) if self.norm else 0
            self.spaces = U[:, :kept], Vh[:kept].T


def _meeting(layer: str, one: tuple[str, _Change], other: tuple[str, _Change]) -> Meeting:
    (a_name, a), (b_name, b) = one, other
    energy = a.norm * b.norm
    products = (a.dense * b.dense).flatten()
    met = float(products.abs().sum(dtype=torch.float64))
    against = -float(products.clamp(max=0).sum(dtype=torch.float64))
    overlaps: list[tuple[float | None, float | None]] = [(None, None), (None, None)]
    if a.spaces is not None and b.spaces is not None:
        overlaps = [_overlap(x, y) for x, y in zip(a.spaces, b.spaces, strict=True)]
    outputs, inputs = overlaps
    return Meeting(
        layer=layer,
        pair=(a_name, b_name),
        norms=(a.norm, b.norm),
        cosine=inner(a.delta, b.delta) / energy if energy else 0.0,
        sign_conflict=against / met if met else 0.0,
        output_overlap=outputs[0],
        input_overlap=inputs[0],
        output_chance=outputs[1],
        input_chance=inputs[1],
    )


def _overlap(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Give the mean squared cosine between two spaces, and what random ones of these dimensions have on average.

    Of spaces of p and q dimensions in n, E Σcos² = pq/n over min(p, q) angles.
    """
    if not one.shape[1] or not other.shape[1]:
        return 0.0, 0.0
    cosines = low_rank.angles(one, other).cos()
    return float(cosines.square().mean()), max(one.shape[1], other.shape[1]) / one.shape[0]


def _merged(name: str, pair: tuple[str, str], meetings: Iterable[Meeting]) -> Meeting:
    meetings = list(meetings)

    def mean(measure: str) -> float | None:
        known = [(getattr(m, measure), m.energy) for m in meetings if getattr(m, measure) is not None]
        total = sum(energy for _, energy in known)
        if not known:
            return None
        return sum(value * energy for value, energy in known) / total if total else 0.0

    return Meeting(
        layer=name,
        pair=pair,
        norms=(hypot(*(m.norms[0] for m in meetings)), hypot(*(m.norms[1] for m in meetings))),
        cosine=mean("cosine") or 0.0,
        sign_conflict=mean("sign_conflict") or 0.0,
        output_overlap=mean("output_overlap"),
        input_overlap=mean("input_overlap"),
        output_chance=mean("output_chance"),
        input_chance=mean("input_chance"),
    )


def _block(layer: str) -> str:
    """Give the block that a layer is in: its name up to the first number and the part after it (attentions, mlp)."""
    numbered = re.match(r".*?\.\d+(\.[^.]+(?=\.))?(?=\.)", layer)
    return numbered[0] if numbered else layer.rpartition(".")[0]


def _place(layer: str) -> tuple[list[tuple[int, str | int]], str]:
    """Order blocks as people count: block 2 before block 10."""
    parts = _block(layer).split(".")
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts], layer


def _table(title: str, meetings: Sequence[Meeting]) -> str:
    width = max(len(title), *(len(meeting.layer) for meeting in meetings))
    lines = [
        f"{title:<{width}}  {'norms':>17}  cosine  conflict  {'outputs (chance)':>16}  {'inputs (chance)':>15}"
    ]
    for m in meetings:
        norms = f"{m.norms[0]:.3g}, {m.norms[1]:.3g}"
        cosine = f"{round(m.cosine, 2) + 0.0:.2f}"  # no -0.00
        outputs = _with_chance(m.output_overlap, m.output_chance)
        inputs = _with_chance(m.input_overlap, m.input_chance)
        lines.append(
            f"{m.layer:<{width}}  {norms:>17}  {cosine:>6}  {m.sign_conflict:>8.2f}  {outputs:>16}  {inputs:>15}"
        )
    return "\n".join(lines)


def _with_chance(overlap: float | None, chance: float | None) -> str:
    return "-" if overlap is None or chance is None else f"{overlap:.2f} ({chance:.2f})"


def _excess(
    rows: Mapping[str, Meeting], overlap: str, chance: str
) -> dict[str, tuple[float | None, float | None]]:
    """Pair each overlap with how far it is beyond chance, 0 to 1, which decides its colour."""
    found: dict[str, tuple[float | None, float | None]] = {}
    for name, meeting in rows.items():
        value, expected = getattr(meeting, overlap), getattr(meeting, chance)
        if value is None:
            found[name] = (None, None)
        else:
            found[name] = (value, max(0.0, value - expected) / (1 - expected) if expected < 1 else 0.0)
    return found


def _plain(meeting: Meeting) -> dict[str, Any]:
    values = asdict(meeting)
    del values["layer"], values["pair"]
    ratio = meeting.relative_norm
    return {**values, "norms": list(meeting.norms), "relative_norm": ratio if isfinite(ratio) else None}
