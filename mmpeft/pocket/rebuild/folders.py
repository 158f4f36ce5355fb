"""Write the image folders that adapters are trained on: styles and a subject that the base has never seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from mmpeft.pocket.rebuild.concepts import CAT_HELD_OUT, CAT_TRAIN, HELD_OUT, STYLE_TRAIN, Concept
from mmpeft.pocket.rebuild.drawings import IconSet

STYLES = ("high-contrast", "fluent-3d", "fluent-flat")
SIDE, MARGIN = 256, 4
"""pixels of a side of a picture, and of the free border around its drawing"""


def write_folders(packages: Path, concepts: Sequence[Concept], folder: Path) -> None:
    """Write `<style>/{train,held_out}` and `cat/{train,held_out}`: PNGs of 256 pixels with caption sidecars.

    A style trains on the 40 concepts of `STYLE_TRAIN` and holds out the 16 of `HELD_OUT`; the cat, on a
    transparent page, trains on six expressions and holds out three. Rebuilds with fewer concepts have fewer.
    """
    by_name = {concept.name: concept for concept in concepts}
    for style in STYLES:
        icons = IconSet(packages, style)
        for split, names in (("train", STYLE_TRAIN), ("held_out", HELD_OUT)):
            captions = {name: name for name in names if name in by_name}
            _write(folder / style / split, icons, by_name, captions)
    icons = IconSet(packages, "fluent-3d")
    _write(folder / "cat" / "train", icons, by_name, CAT_TRAIN, transparent=True)
    _write(folder / "cat" / "held_out", icons, by_name, CAT_HELD_OUT, transparent=True)


def _write(
    folder: Path,
    icons: IconSet,
    concepts: Mapping[str, Concept],
    captions: Mapping[str, str],
    *,
    transparent: bool = False,
) -> None:
    folder.mkdir(parents=True)
    for index, (name, caption) in enumerate(captions.items()):
        drawing = icons.render(concepts[name], SIDE - 2 * MARGIN)
        if drawing is None:
            continue
        page = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0 if transparent else 255))
        page.alpha_composite(drawing, (MARGIN, MARGIN))
        (page if transparent else page.convert("RGB")).save(folder / f"{index:04d}.png", optimize=True)
        (folder / f"{index:04d}.txt").write_text(caption + "\n", encoding="utf-8")
