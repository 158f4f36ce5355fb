"""How far an adapter moves pictures that did not ask for it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmpeft.evaluation.bootstrap import interval


def drift(adapted: Sequence[Image.Image], base: Sequence[Image.Image]) -> tuple[float, tuple[float, float]]:
    """Compare pictures with and without an adapter: 0 unchanged, 1 as different as another prompt.

    mean ‖with adapter - base‖ over the prompts, divided by the mean distance between the base's pictures of different
    prompts; Euclidean distance of the 8-bit RGB values.

    Args:
        adapted: one picture a prompt, with the adapter.
        base: the base's pictures of the same prompts and seeds; at least two.

    Returns:
        The drift and its 95 % bootstrap interval over the prompts.
    """
    with_adapter, without = _vectors(adapted), _vectors(base)
    moved = np.linalg.norm(with_adapter - without, axis=1)
    apart = np.linalg.norm(without[:, None] - without[None], axis=2)
    typical = apart[~np.eye(len(without), dtype=bool)].mean()
    low, high = interval(moved / typical)
    return round(float(moved.mean() / typical), 4), (low, high)


def _vectors(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image.convert("RGB"), dtype=np.float64).ravel() for image in images])
