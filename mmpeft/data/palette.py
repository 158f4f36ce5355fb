"""Give pictures the colours of other pictures: what a style does to colour, without what it draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmpeft.randomness import seed_of

ROUNDS = 10
"""turns of the colour space; more change less than a grey level"""


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
