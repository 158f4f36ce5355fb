"""Render the packages' SVG drawings; put them on backgrounds."""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, from_numpy

from mmpeft.errors import MissingDependency
from mmpeft.pocket.rebuild.concepts import Concept, plain_code

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]

SIDE = 64
"""pixels of a side of every picture that a model sees"""
SETS = {
    "noto": ("noto", 62),
    "twemoji": ("twemoji", 58),
    "fluent-3d": ("fluent-emoji", 62),
    "fluent-flat": ("fluent-emoji-flat", 62),
    "high-contrast": ("fluent-emoji-high-contrast", 62),
}
"""drawing style -> (package folder, side of the drawing inside the 64 pixels)"""
KNOWN_SETS = ("noto", "twemoji")
"""what autoencoder and CLIP learn from; the other styles stay unseen by the base"""
SUPERSAMPLING = 4
INK = "#1b1b1b"
"""what single-coloured drawings are drawn in"""
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Drawings:
    """The drawings of one style."""

    pixels: Pixels
    """(N, 64, 64, 4), RGBA, alpha not premultiplied"""
    names: tuple[str, ...]
    """which concept each shows, (N,)"""


class IconSet:
    """One package of drawings, found by code."""

    def __init__(self, packages: Path, style: str) -> None:
        folder = packages / SETS[style][0]
        self._icons: dict[str, Any] = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        # The 3D package has no codes of its own; the flat one draws the same concepts under the same names.
        coded = "fluent-emoji-flat" if style == "fluent-3d" else SETS[style][0]
        codes = json.loads((packages / coded / "chars.json").read_text(encoding="utf-8"))
        self._names = {plain_code(code): name for code, name in codes.items()}

    def render(self, concept: Concept, side: int) -> Image.Image | None:
        """Draw a concept as a square RGBA picture, or give None if the package does not have it.

        Raises:
            MissingDependency: resvg_py is not installed.
        """
        icon = self._icons["icons"].get(self._names.get(concept.code))
        return None if icon is None else _rasterise(self._svg(icon), side)

    def _svg(self, icon: dict[str, Any]) -> str:
        width = icon.get("width", self._icons["width"])
        height = icon.get("height", self._icons["height"])
        square = max(width, height)
        left, top = icon.get("left", 0) - (square - width) / 2, icon.get("top", 0) - (square - height) / 2
        namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        box = f'width="{square}" height="{square}" viewBox="{left} {top} {square} {square}"'
        return f"<svg {namespaces} {box}>{icon['body'].replace('currentColor', INK)}</svg>"


def _rasterise(svg: str, side: int) -> Image.Image:
    try:
        import resvg_py
    except ModuleNotFoundError as missing:
        raise MissingDependency(
            "resvg_py", "rendering the drawings", "pip install 'mmpeft[pocket]'"
        ) from missing
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def draw_all(packages: Path, concepts: Sequence[Concept], folder: Path) -> None:
    """Render every concept in every style into `folder/<style>.npz`; a style may lack some concepts."""
    folder.mkdir(parents=True)
    for style, (_, inner) in SETS.items():
        icons, pixels, names = IconSet(packages, style), [], []
        for concept in concepts:
            large = icons.render(concept, inner * SUPERSAMPLING)
            if large is not None:
                pixels.append(shrink(large, inner))
                names.append(concept.name)
        np.savez(folder / f"{style}.npz", pixels=np.stack(pixels), names=np.array(names))


def load_drawings(folder: Path, style: str) -> Drawings:
    """Read what `draw_all` wrote."""
    with np.load(folder / f"{style}.npz") as saved:
        return Drawings(saved["pixels"], tuple(saved["names"].tolist()))


def shrink(large: Image.Image, inner: int) -> Pixels:
    """Average a supersampled drawing down to `inner` pixels and centre it, (64, 64, 4).

    Colours are averaged with alpha premultiplied, so that no fringe of the transparent colour appears.
    """
    full = np.asarray(large, np.float32) / 255
    full[..., :3] *= full[..., 3:]
    small = full.reshape(inner, SUPERSAMPLING, inner, SUPERSAMPLING, 4).mean((1, 3))
    page = np.zeros((SIDE, SIDE, 4), np.float32)
    start = (SIDE - inner) // 2
    page[start : start + inner, start : start + inner] = small
    alpha = page[..., 3:]
    page[..., :3] = np.where(alpha > 1e-4, page[..., :3] / np.maximum(alpha, 1e-4), 1)
    return to_bytes(page)


def put_on(drawing: Pixels, background: tuple[int, int, int] = WHITE) -> Pixels:
    """Put RGBA drawings (..., 4) on a plain colour: (..., 3)."""
    alpha = drawing[..., 3:].astype(np.float32) / 255
    blended = drawing[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
    return (blended + 0.5).astype(np.uint8)


def to_bytes(picture: Floats) -> Pixels:
    """Round values in [0, 1] to bytes."""
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def to_tensor(pictures: Iterable[Pixels]) -> Tensor:
    """Stack RGB pictures (64, 64, 3) for a model: (B, 3, 64, 64), float32, in [-1, 1]."""
    stacked = np.stack(list(pictures)).astype(np.float32) / 127.5 - 1
    return from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
