"""Find a drawing's main colour, paint it in another, and keep some pairs of concept and colour unseen."""

import hashlib

import numpy as np

from mmpeft.pocket.rebuild.drawings import Floats, Pixels, to_bytes

HUES = {"red": 2, "orange": 28, "yellow": 48, "green": 125, "blue": 212, "purple": 275, "pink": 335}
"""colour word -> the hue that it is painted with, degrees"""
PAINTS = (*HUES, "black", "brown", "gray")
"""colour words that a drawing can be painted in"""
COLOUR_WORDS = frozenset(PAINTS) | {"white"}
BACKGROUNDS = {
    "red": (225, 60, 55),
    "orange": (245, 150, 50),
    "yellow": (250, 215, 80),
    "green": (90, 185, 90),
    "blue": (80, 140, 230),
    "purple": (150, 95, 205),
    "pink": (245, 160, 195),
    "black": (25, 25, 28),
    "gray": (150, 150, 155),
}
"""colour word -> RGB of "on a ... background" """

# The hues (degrees) that people would call by the word; the gaps between are left unnamed.
_NAMED_HUES = (
    ("red", -14, 12), ("orange", 16, 38), ("yellow", 40, 62), ("green", 80, 160), ("blue", 188, 238),
    ("purple", 255, 295), ("pink", 312, 342),
)  # fmt: skip
# Beside the hashed eighth, some pairs that make good demonstrations.
_KEPT_UNSEEN = frozenset(
    {
        ("red apple", "blue"),
        ("automobile", "green"),
        ("pizza", "green"),
        ("rocket", "purple"),
        ("cat face", "blue"),
    }
)


def is_kept_unseen(name: str, colour: str) -> bool:
    """Say whether no training picture may show this concept painted in this colour: about one pair in eight."""
    digest = hashlib.md5(f"{name}|{colour}".encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % 8 == 0 or (name, colour) in _KEPT_UNSEEN


def main_hue(drawing: Pixels) -> tuple[float, float, float]:
    """Find the hue that most of a drawing's colour has.

    Args:
        drawing: (64, 64, 4), RGBA.

    Returns:
        The hue, in [0, 360); the share of the colour mass within 28 degrees of it; and the colour mass
        (saturation times value times alpha) per opaque pixel, both in [0, 1].
    """
    picture = drawing.astype(np.float32) / 255
    alpha = picture[..., 3]
    hue, saturation, value = to_hsv(picture[..., :3])
    mass = saturation * value * alpha * (saturation > 0.2)
    histogram = np.bincount((hue.ravel() // 10).astype(int) % 36, mass.ravel(), 36)
    smooth = sum(np.roll(histogram, shift) for shift in range(-2, 3))
    middle = int(np.argmax(smooth)) * 10 + 5
    turn = _turn(hue, middle)
    near = mass * (np.abs(turn) < 28)
    found = middle + float((turn * near).sum() / max(near.sum(), 1e-6))
    share = float(near.sum() / max(mass.sum(), 1e-6))
    return found % 360, share, float(mass.sum() / max(alpha.sum(), 1))


def hue_name(hue: float) -> str | None:
    """Call a hue (degrees) by its colour word, or None between two words."""
    for name, low, high in _NAMED_HUES:
        if low <= hue <= high or low <= hue - 360 <= high:
            return name
    return None


def paintable_hue(drawing: Pixels) -> float | None:
    """Give the hue (degrees) that painting replaces, or None for drawings of many colours or of none."""
    hue, share, colourfulness = main_hue(drawing)
    return hue if share > 0.6 and colourfulness > 0.15 else None


def own_colour(drawing: Pixels) -> str | None:
    """Give the colour word that a caption may say of a drawing as it is, or None."""
    hue, share, colourfulness = main_hue(drawing)
    return hue_name(hue) if share > 0.7 and colourfulness > 0.2 else None


def paint(drawing: Pixels, hue: float, colour: str) -> Pixels:
    """Replace one hue of a drawing by a colour; shading, outlines and other hues stay.

    Args:
        drawing: (64, 64, 4), RGBA.
        hue: what is replaced, degrees, within about 45 either side.
        colour: one of `PAINTS`.
    """
    picture = drawing.astype(np.float32) / 255
    old, saturation, value = to_hsv(picture[..., :3])
    turn = _turn(old, hue)
    strength = np.clip((48 - np.abs(turn)) / 12, 0, 1) * (saturation > 0.08)
    painted = _painted(old, saturation, value, turn, colour)
    picture[..., :3] += (painted - picture[..., :3]) * strength[..., None]
    return to_bytes(picture)


def _painted(hue: Floats, saturation: Floats, value: Floats, turn: Floats, colour: str) -> Floats:
    if colour == "black":
        return to_rgb(hue, saturation * 0.12, value * 0.28 + 0.03)
    if colour == "gray":
        return to_rgb(hue, saturation * 0.06, value * 0.72)
    if colour == "brown":
        return to_rgb((22 + turn * 0.25) % 360, np.clip(saturation * 0.85, 0, 0.75), value * 0.58)
    if colour in ("yellow", "orange"):  # dark yellow would look brown
        value = 0.35 + 0.65 * value
    elif colour in ("blue", "purple"):  # full-value blue glares
        value = 0.08 + 0.85 * value
    elif colour == "pink":
        saturation, value = saturation * 0.6, 0.45 + 0.55 * value
    return to_rgb((HUES[colour] + turn * 0.35) % 360, saturation, value)


def _turn(hue: Floats, to: float) -> Floats:
    """Give the signed angle from `to` to each hue, in [-180, 180)."""
    return (hue - to + 180) % 360 - 180


def to_hsv(rgb: Floats) -> tuple[Floats, Floats, Floats]:
    """Split colours (..., 3) in [0, 1] into hue in [0, 360), saturation and value in [0, 1], each (...)."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low
    safe = np.maximum(spread, 1e-6)
    sector = np.where(
        high == red,
        ((green - blue) / safe) % 6,
        np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = np.where(spread < 1e-6, 0, sector * 60)
    return hue, np.where(high > 1e-6, spread / np.maximum(high, 1e-6), 0), high


def to_rgb(hue: Floats, saturation: Floats, value: Floats) -> Floats:
    """Undo `to_hsv`: (..., 3) in [0, 1]."""
    channels = []
    for offset in (5, 3, 1):
        sector = (offset + hue / 60) % 6
        channels.append(value - value * saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1))
    return np.stack(channels, -1)
