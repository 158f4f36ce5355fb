"""One picture of what the model will see and read."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmpeft.data.buckets import Bucket
from mmpeft.data.image_folder import ImageFolder
from mmpeft.data.pictures import fit
from mmpeft.picture_grid import FRAME, GREY, INK, PAPER, enlarged, shortened, wrapped

_VIEW = 192
_GAP = 16
_COLUMNS = 8
_CAPTION_LINES = 3


def contact_sheet(
    folder: ImageFolder,
    assignments: Sequence[Bucket],
    captions: Sequence[str],
    path: Path,
    *,
    offsets: Sequence[tuple[float, float]] | None = None,
    limit: int = 64,
) -> int:
    """Draw the crops of a folder as the model will see them, with the captions that it will read, as a PNG.

    Each crop is made at its bucket's size; a small one is then shown with whole pixels enlarged, a large one
    scaled down. Of more images than `limit` an even choice is drawn, and the heading says so.

    Args:
        folder: the folder.
        assignments: bucket of each record.
        captions: final caption of each record.
        path: file to write; its folder is made.
        offsets: (left, top) of each record's crop as `fit` takes it; none means centred.
        limit: pictures on the sheet, at most.

    Returns:
        The number of pictures drawn.

    Raises:
        DataError: an image was changed since the folder was looked through.
    """
    total = len(folder.records)
    chosen = range(total) if total <= limit else [place * total // limit for place in range(limit)]
    columns = min(_COLUMNS, len(chosen))
    small, plain, bold = (ImageFont.load_default(size) for size in (11, 13, 18))
    texts = {place: wrapped(captions[place] or "(no text)", _VIEW, plain, _CAPTION_LINES) for place in chosen}
    cell_width = _VIEW + _GAP
    cell_height = _VIEW + 22 + 17 * max(map(len, texts.values())) + _GAP + 4
    width = max(columns * cell_width + _GAP, 480)
    top = 60
    sheet = Image.new("RGB", (width, top + -(-len(chosen) // columns) * cell_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    shown = (
        f"all {total} images" if len(chosen) == total else f"{len(chosen)} of {total} images, evenly chosen"
    )
    draw.text((_GAP, 12), "What the model sees and reads", INK, bold)
    draw.text((_GAP, 36), shown, GREY, plain)
    for cell, place in enumerate(chosen):
        x = _GAP + cell % columns * cell_width
        y = top + cell // columns * cell_height
        bucket, offset = assignments[place], offsets[place] if offsets else (0.5, 0.5)
        view = _view(fit(folder.picture(place), *bucket, *offset))
        # On the cell's ground line, so that the captions of a row stand at one height.
        left, upper = x + (_VIEW - view.width) // 2, y + _VIEW - view.height
        sheet.paste(view, (left, upper))
        draw.rectangle((left - 1, upper - 1, left + view.width, upper + view.height), outline=FRAME)
        record = folder.records[place]
        size = f"{bucket}  "
        draw.text((x, y + _VIEW + 6), size, INK, small)
        name_x = x + draw.textlength(size, small)
        draw.text((name_x, y + _VIEW + 6), shortened(record.name, x + _VIEW - name_x, small), GREY, small)
        for number, line in enumerate(texts[place]):
            draw.text((x, y + _VIEW + 22 + number * 17), line, INK if captions[place] else GREY, plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return len(chosen)


def _view(crop: Image.Image) -> Image.Image:
    view = enlarged(crop, _VIEW)
    view.thumbnail((_VIEW, _VIEW), Image.Resampling.LANCZOS)
    return view
