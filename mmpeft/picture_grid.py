"""Sheets of pictures with labels, and the text drawing that they need."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmpeft.errors import ConfigError

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

PAPER, INK, GREY, FRAME = "#fafafa", "#1c1c1c", "#7a7a7a", "#d8d8d8"
_GAP = 12
_FONT_SIZE = 14
_LINE_HEIGHT = 18
_LABEL_LINES = 4


def picture_grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    cell: int = 256,
) -> Image.Image:
    """Lay pictures out in rows and columns with labels at the left and on top.

    Args:
        rows: pictures of any sizes; a row may be shorter than others.
        row_labels: one for each row; long ones are broken into lines.
        column_labels: one for each column.
        cell: side in pixels up to which small pictures are enlarged, by a whole factor so that their pixels stay what
            they are; larger pictures keep their size.

    Returns:
        An RGB sheet.

    Raises:
        ConfigError: there is no picture, or there are more or fewer labels than rows or columns.
    """
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ConfigError("a picture grid needs at least one picture")
    for labels, count, what in ((row_labels, len(rows), "rows"), (column_labels, columns, "columns")):
        if labels is not None and len(labels) != count:
            raise ConfigError(f"the grid has {count} {what}; got {len(labels)} labels for them")
    views = [[enlarged(picture.convert("RGB"), cell) for picture in row] for row in rows]
    width = max(view.width for row in views for view in row)
    heights = [max((view.height for view in row), default=0) for row in views]
    font = ImageFont.load_default(_FONT_SIZE)
    left = _wrapped(row_labels or (), min(width, 240), font)
    top = _wrapped(column_labels or (), width, font)
    left_width = _GAP + max(
        (int(font.getlength(line)) + 1 for lines in left for line in lines), default=-_GAP
    )
    top_height = _GAP + max((len(lines) * _LINE_HEIGHT for lines in top), default=-_GAP)
    size = (left_width + _GAP + columns * (width + _GAP), top_height + _GAP + sum(heights) + len(rows) * _GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(top):
        _write(draw, (left_width + _GAP + column * (width + _GAP), _GAP), lines, font)
    y = top_height + _GAP
    for number, (row, height) in enumerate(zip(views, heights, strict=True)):
        if left:
            _write(draw, (_GAP, y + (height - len(left[number]) * _LINE_HEIGHT) // 2), left[number], font)
        for column, view in enumerate(row):
            sheet.paste(view, (left_width + _GAP + column * (width + _GAP), y))
        y += height + _GAP
    return sheet


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """Enlarge a picture by the largest whole factor that keeps its sides within so many pixels; a larger one passes."""
    factor = max(1, side // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def shortened(text: str, width: float, font: Font) -> str:
    """Leave out the middle of a text until it is no wider than so many pixels."""
    kept = text
    while font.getlength(kept) > width and len(kept) > 3:
        half = (len(kept) - 2) // 2
        kept = f"{text[:half]}…{text[-half:]}" if half else "…"
    return kept


def wrapped(text: str, width: float, font: Font, lines: int) -> list[str]:
    """Break a text into lines of at most so many pixels; what needs more than `lines` of them ends in dots."""
    broken = [""]
    for word in text.split():
        longer = f"{broken[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            broken[-1] = longer
        else:
            broken.append(shortened(word, width, font))
    broken = [line for line in broken if line]
    if len(broken) > lines:
        last = broken[lines - 1]
        while font.getlength(f"{last} …") > width:
            last = last[:-1]
        broken[lines - 1 :] = [f"{last} …"]
    return broken


def _wrapped(labels: Sequence[str], width: int, font: Font) -> list[list[str]]:
    return [wrapped(label, width, font, _LABEL_LINES) for label in labels]


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], font: Font) -> None:
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * _LINE_HEIGHT), line, INK, font)


def check_place(path: Path) -> None:
    """Make the folder that a picture is to lie in, and refuse names whose ending tells no format.

    Raises:
        ConfigError: so, or there can be no such folder.
    """
    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise ConfigError(
            f"{path}: a picture's name ends in .png, .jpg or .webp; got {path.suffix or 'no ending'!r}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"there can be no folder {path.parent}: {error.strerror or error}") from error


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format that its name's ending tells.

    Raises:
        ConfigError: as `check_place`, or the disk does not take it.
    """
    check_place(path)
    try:
        picture.save(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
