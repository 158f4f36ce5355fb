"""Give pictures the contrast and colours of others: what a style does to a surface, without what it draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmpeft.randomness import seed_of

ROUNDS = 16
"""turns of the colour space; more change less than a grey level"""
BANDS = (1.0, 2.0, 4.0)
"""widths of the Gaussians between which details are told apart, pixels of a 64-pixel picture"""
MOST = 8.0
"""how much a band of detail is strengthened or weakened at most"""


def restyle(
    pictures: Sequence[Image.Image], reference: Sequence[Image.Image], *, seed: int
) -> list[Image.Image]:
    """Give pictures the contrast of the reference at each scale, then its colours; arguments as `transfer_palette`."""
    return transfer_palette(match_contrast(pictures, reference), reference, seed=seed)


def match_contrast(pictures: Sequence[Image.Image], reference: Sequence[Image.Image]) -> list[Image.Image]:
    """Scale each band of detail of each picture to the strength that it has in the reference, in the mean.

    Burt and Adelson 1983, "The Laplacian Pyramid as a Compact Image Code", without subsampling.

    Args:
        pictures: RGB, of one size.
        reference: RGB, of any one size.
    """
    changed, (details, rest) = [], _bands(pictures)
    wanted, _ = _bands(reference)
    for detail, goal in zip(details, wanted, strict=True):
        gain = _strength(goal).mean() / _strength(detail).clip(1e-2)
        changed.append(detail * gain.clip(1 / MOST, MOST))
    result = (rest + sum(changed)).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in result]


def transfer_palette(
    pictures: Sequence[Image.Image], reference: Sequence[Image.Image], *, seed: int
) -> list[Image.Image]:
    """Recolour pictures so that their colours, taken together, are distributed as the reference's.

    Iterative distribution transfer: matching the sorted values along the axes of a turned colour space moves the one
    distribution to the other when repeated over turns. Pitié, Kokaram and Dahyot 2007, "Automated colour grading using
    colour distribution transfer", CVIU 107. Nothing moves in the plane, so what a picture shows stays.

    Args:
        pictures: RGB, of one size; at least one.
        reference: RGB, of any one size; at least one.
        seed: of the turns and of the dither that parts equal colours.

    Returns:
        The pictures in new colours, in their order.
    """
    random = np.random.default_rng(seed_of(seed, "palette"))
    source, wanted = _colours(pictures), _colours(reference)
    shape = (len(pictures), pictures[0].height, pictures[0].width, 3)
    # Flat areas would jump as one: a dither of half a grey level lets them part.
    source = source + random.normal(0, 0.5, source.shape)
    for turn in range(ROUNDS):
        drawn = np.linalg.qr(random.normal(size=(3, 3)))[0]
        axes = drawn if turn % 4 else np.linalg.eigh(np.cov(wanted.T))[1]
        turned, goal = source @ axes, np.sort(wanted @ axes, axis=0)
        order = np.argsort(turned, axis=0, kind="stable")
        ranks = ((np.arange(len(turned)) + 0.5) * len(goal) / len(turned)).astype(int)
        for axis in range(3):
            turned[order[:, axis], axis] = goal[ranks, axis]
        source = turned @ axes.T
    recoloured = source.reshape(shape).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in recoloured]


def _colours(pictures: Sequence[Image.Image]) -> np.ndarray:
    return np.concatenate([np.asarray(p.convert("RGB"), dtype=np.float64).reshape(-1, 3) for p in pictures])


def _bands(pictures: Sequence[Image.Image]) -> tuple[list[np.ndarray], np.ndarray]:
    """Split pictures, (N, H, W, 3), into bands of detail from fine to coarse, and the rest; they add up to it."""
    blurred = np.stack([np.asarray(p.convert("RGB"), dtype=np.float32) for p in pictures])
    scale, details = blurred.shape[2] / 64, []
    for width in BANDS:
        softer = np.stack([_blur(picture, width * scale) for picture in blurred])
        details.append(blurred - softer)
        blurred = softer
    return details, blurred


def _blur(picture: np.ndarray, width: float) -> np.ndarray:
    """Blur (H, W, 3) with a Gaussian that is `width` pixels wide; edges are continued."""
    reach = int(3 * width)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * width**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(picture, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="edge")
        picture = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return picture.astype(np.float32)


def _strength(detail: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt((detail**2).mean((1, 2, 3), keepdims=True)))
