"""Whether the text encoder can tell a caption with the trigger from one without it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft.backbones.base import ImageBackbone

SEEN = 0.3
"""below this share a frozen text encoder hardly sees the trigger, and a style leaks into prompts without it"""


@torch.no_grad()
def trigger_visibility(backbone: ImageBackbone, with_trigger: Sequence[str], without: Sequence[str]) -> float:
    """Compare how far the trigger moves a caption's embedding with how far captions lie apart.

    mean ‖E(caption with trigger) - E(caption)‖ / mean ‖E(caption) - E(another caption)‖, over all token positions. A
    denoiser whose text encoder is frozen can only heed a trigger that moves its conditioning.

    Args:
        with_trigger: captions as the model reads them.
        without: the same captions without the trigger, in the same order; at least two different ones.

    Returns:
        0 for a trigger that changes nothing, about 1 for one that changes as much as another caption does.
    """
    called, plain = _embedded(backbone, with_trigger), _embedded(backbone, without)
    moved = (called - plain).norm(dim=1).mean()
    apart = torch.cdist(plain, plain)
    return float(moved / apart[apart > 0].mean())


def _embedded(backbone: ImageBackbone, captions: Sequence[str]) -> Tensor:
    states = backbone.encode_text(captions)
    return torch.cat([tensor.flatten(1).float() for _, tensor in sorted(states.items())], 1)
