"""The README's table of what fusion.py measured."""

from collections.abc import Iterable
from typing import Any

# Of every adapter that is measured.
RANK = 16


def table(results: dict[str, Any]) -> str:
    """Write the README's table."""
    rows = [
        *svd_cells(results["svd"]),
        composition_cells(results["composition"]),
        *(live_cells(title, row) for title, row in results["live"].items()),
        *(switching_cells(title, row) for title, row in results["switching"].items()),
        *fusing_cells(results["fusing"]),
    ]
    lines = ["| what | mmpeft | PEFT or diffusers | ratio |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"One thread, processor time, medians of sides taking turns, whole adapters once: {versions}.",
        ]
    )


def span(milliseconds: float) -> str:
    if milliseconds < 20:
        return f"{milliseconds:.1f} ms"
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


def svd_cells(rows: list[dict[str, Any]]) -> Iterable[list[str]]:
    for row in rows:
        ms, error = row["milliseconds"], row["error"]
        yield [
            f"`svd` of four adapters to rank {RANK}, layer {' x '.join(map(str, row['layer']))}",
            f"{span(ms['ours'])}, error {error['ours']:.6f}",
            f"{span(ms['peft'])}, error {error['peft']:.6f}",
            f"{row['ratio']:.0f} times faster",
        ]


def composition_cells(row: dict[str, Any]) -> list[str]:
    seconds, known = row["peft seconds, at least"], row["layers whose shape was timed"]
    return [
        f"the same for all {row['layers']} attention, feed-forward and residual layers of SD 1.5",
        f"{row['seconds']:.1f} s",
        f"at least {seconds / 60:.1f} minutes, extrapolated from one layer of each shape of {known} of them; another "
        f"one counts as the slowest of those that are no larger",
        f"{seconds / row['seconds']:.0f} times faster",
    ]


def live_cells(title: str, row: dict[str, Any]) -> list[str]:
    ms = row["milliseconds"]
    return [
        f"live, {title}: {span(ms['base'])} without adapters",
        f"one {span(ms['ours, one'])}, eight {span(ms['ours, eight'])}",
        f"one {span(ms['peft, one'])}",
        f"one costs {row['one']:.2f}, eight {row['eight']:.2f} of PEFT's one",
    ]


def switching_cells(title: str, row: dict[str, Any]) -> list[str]:
    ms, loads = row["milliseconds"], row["against load_lora_weights"]
    is_load = title.startswith("load")
    against = "" if is_load else f", {loads:.0f} times faster than `load_lora_weights`"
    return [
        f"{title}, pocket",
        span(ms["ours"]),
        f"{span(ms['diffusers'])} by `{'load_lora_weights' if is_load else 'set_adapters'}`",
        f"{row['ratio']:.1f} times faster{against}",
    ]


def fusing_cells(row: dict[str, Any]) -> Iterable[list[str]]:
    ms, ours, theirs = row["milliseconds"], row["drift"]["ours"], row["drift"]["diffusers"]
    for verb in ("fuse", "unfuse"):
        mine, other = ms[f"ours, {verb}"], ms[f"diffusers, {verb}"]
        yield [
            f"{verb}, pocket in bfloat16",
            span(mine),
            f"{span(other)} by `{verb}_lora`",
            f"{mine / other:.2f} of the time",
        ]
    yield [
        f"left after {row['cycles']} cycles at varying weights",
        f"{ours['bytes that differ']} bytes differ",
        f"{theirs['bytes that differ']:,} bytes differ, {theirs['distance over the change']:.1%} of the change",
        "",
    ]
