"""Vary training pictures: geometry, and small draws that the stages share."""

import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[float, float]


def between(low: float, high: float, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Draw uniform numbers in [low, high), float32."""
    return low + (high - low) * torch.rand(shape, generator=draw)


def chance(draw: torch.Generator) -> float:
    """Draw one uniform number in [0, 1)."""
    return torch.rand((), generator=draw).item()


def warp(
    pictures: Tensor,
    draw: torch.Generator,
    *,
    shrink: Range,
    turn: float = 0.0,
    shift: float = 0.0,
    stretch: Range = (1.0, 1.0),
) -> Tensor:
    """Shrink, turn, shift and stretch each picture differently; what comes in from outside repeats the border.

    Args:
        pictures: (B, C, H, W).
        shrink: range of the factor by which it gets smaller; below 1 it gets larger.
        turn: greatest angle either way, radians.
        shift: greatest shift either way, in half sides.
        stretch: range of the factor by which it gets lower.

    Returns:
        (B, C, H, W).
    """
    count = len(pictures)
    size, angle = between(*shrink, (count,), draw), between(-turn, turn, (count,), draw)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = size * angle.cos()
    matrix[:, 0, 1] = -size * angle.sin()
    matrix[:, 1, 0] = size * angle.sin()
    matrix[:, 1, 1] = size * angle.cos() * between(*stretch, (count,), draw)
    matrix[:, :, 2] = between(-shift, shift, (count, 2), draw)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
