"""A table of numbers as a picture: rows and columns with labels, every cell coloured by its value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

from mmpeft.picture_grid import FRAME, GREY, INK, PAPER, Font, shortened, wrapped

_AGAINST, _TOGETHER, _SHARED, _NOTHING = (226, 116, 41), (58, 120, 196), (121, 68, 176), (255, 255, 255)
_CELL, _ROW, _GAP, _LINE = 76, 26, 14, 17
_LABEL_WIDTH = 420


@dataclass(frozen=True)
class Column:
    """One column of a heat map.

    Args:
        group: columns of one group that stand side by side share a title.
        title: its own.
        cells: row label -> (the number that is written, how strongly the cell is coloured from -1 to 1); None is empty.
        is_signed: blue for above 0 and orange for below; else violet for above 0.
    """

    group: str
    title: str
    cells: Mapping[str, tuple[float | None, float | None]]
    is_signed: bool = True


def heat_map(columns: Sequence[Column], legend: str) -> Image.Image:
    """Draw columns side by side, a row for each label that any of them has, in the order in which they come.

    Returns:
        An RGB picture.
    """
    font, small = ImageFont.load_default(13), ImageFont.load_default(12)
    rows = list(dict.fromkeys(label for column in columns for label in column.cells))
    left = _GAP * 2 + min(_LABEL_WIDTH, max(int(font.getlength(label)) + 1 for label in rows))
    titles = [wrapped(column.title, _CELL - 6, small, 2) for column in columns]
    top = _GAP + _LINE + 4 + max(map(len, titles)) * _LINE + 4
    width = left + len(columns) * _CELL + _GAP
    notes = wrapped(legend, width - 2 * _GAP, small, 4)
    sheet = Image.new("RGB", (width, top + len(rows) * _ROW + _GAP + len(notes) * _LINE + _GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    x = left
    for group, members in groupby(columns, key=lambda column: column.group):
        span = _CELL * len(list(members))
        _centred(draw, (x, _GAP, span), shortened(group, span - 8, font), font, INK)
        draw.line([(x + 2, _GAP + _LINE + 2), (x + span - 3, _GAP + _LINE + 2)], FRAME)
        x += span
    for number, lines in enumerate(titles):
        for at, line in enumerate(lines):
            y = _GAP + _LINE + 6 + at * _LINE
            _centred(draw, (left + number * _CELL, y, _CELL), line, small, GREY)
    for place, label in enumerate(rows):
        y = top + place * _ROW
        draw.text((_GAP, y + 5), shortened(label, left - 2 * _GAP, font), INK, font)
        for number, column in enumerate(columns):
            _draw_cell(draw, (left + number * _CELL, y), column, label, small)
    for at, line in enumerate(notes):
        draw.text((_GAP, top + len(rows) * _ROW + _GAP + at * _LINE), line, GREY, small)
    return sheet


def _draw_cell(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], column: Column, label: str, font: Font
) -> None:
    x, y = place
    value, strength = column.cells.get(label, (None, None))
    colour = _colour(strength or 0.0, column.is_signed)
    draw.rectangle([x, y, x + _CELL - 1, y + _ROW - 1], fill=colour, outline=FRAME)
    if value is not None:
        _centred(
            draw, (x, y + 5, _CELL), f"{round(value, 2) + 0.0:.2f}", font, INK if sum(colour) > 400 else PAPER
        )


def _colour(strength: float, is_signed: bool) -> tuple[int, int, int]:
    full = (_TOGETHER if strength > 0 else _AGAINST) if is_signed else _SHARED
    # the root shows small strengths, where most layers are
    share = min(1.0, abs(strength)) ** 0.5
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(_NOTHING, full, strict=True))
    return red, green, blue


def _centred(
    draw: ImageDraw.ImageDraw, place: tuple[int, int, int], text: str, font: Font, colour: str
) -> None:
    x, y, width = place
    draw.text((x + (width - font.getlength(text)) / 2, y), text, colour, font)
