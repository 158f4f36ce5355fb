"""Masks laid on what a denoiser computes with: its latents at every resolution, and tokens that are places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import BankError
from mmpeft.mix import Mask


class Places:
    """Masks, and where in them the tokens of the present forward pass lie.

    Masks are chosen by their number; -1 is a mask of ones.
    """

    def __init__(self, masks: Sequence[Mask]) -> None:
        self.masks = tuple(masks)
        self._resized: dict[tuple[Any, ...], Tensor] = {}
        self._sizes: list[tuple[int, int]] = []
        self._text_length = 0

    def learn(
        self, given: Mapping[str, Any], patch: int | None, declared: tuple[int, int] | None = None
    ) -> None:
        """Learn the sizes, (h, w), that the latents have in a forward pass of the denoiser.

        Args:
            given: the denoiser's arguments by name.
            patch: side of a transformer's patches; None is a UNet, which halves its latents, rounding up.
            declared: places of the tokens, for denoisers that are fed tokens.
        """
        text = given.get("encoder_hidden_states")
        self._text_length = text.shape[1] if isinstance(text, Tensor) else 0
        sample = given["sample"] if "sample" in given else given.get("hidden_states")
        if not isinstance(sample, Tensor) or sample.ndim != 4:
            known = declared or (_places_of_ids(given.get("img_ids")) if self.masks else None)
            self._sizes = [known] if known else []
        elif patch is not None:
            self._sizes = [(sample.shape[-2] // patch, sample.shape[-1] // patch)]
        else:
            self._sizes = _halved(sample.shape[-2], sample.shape[-1])

    def over_pixels(self, masks: Sequence[int], x: Tensor) -> Tensor:
        """Give masks for a tensor (B, C, h, w): (1, n, h, w), in its type."""
        return self._at(masks, x.shape[-2], x.shape[-1], x)[None]

    def mean(self, masks: Sequence[int], x: Tensor) -> Tensor:
        """Give the means of masks, (1, 1, n), in `x`'s type."""
        return self._at(masks, 1, 1, x).reshape(1, 1, -1)

    def over_tokens(self, masks: Sequence[int], x: Tensor, layer: str) -> Tensor:
        """Give masks for tokens (B, T, D): (1, T, n), in their type; tokens that are text get the masks' means.

        Raises:
            BankError: the tokens are neither places at one of the latents' sizes, nor text, nor text and places.
        """
        tokens = x.shape[1] if x.ndim == 3 else -1
        for height, width in self._sizes:
            if tokens == height * width:
                return self._at(masks, height, width, x).flatten(1).T[None]
        if tokens == self._text_length:
            return self.mean(masks, x)
        for height, width in self._sizes:
            if tokens == self._text_length + height * width:
                text = self.mean(masks, x).expand(1, self._text_length, -1)
                return torch.cat([text, self._at(masks, height, width, x).flatten(1).T[None]], 1)
        known = " or ".join(f"{h} x {w}" for h, w in self._sizes)
        raise BankError(
            f"a mask cannot be laid on {layer}, a tensor of shape {tuple(x.shape)}: "
            + (
                f"the picture has {known} places here"
                if known
                else "its places are not known; declare them with bank.batch(BatchLayout(..., places=(h, w)))"
            )
        )

    def _at(self, masks: Sequence[int], height: int, width: int, x: Tensor) -> Tensor:
        """Give masks at a size, (n, height, width)."""
        if torch.compiler.is_compiling():
            areas = self._make(height, width, x)
        else:
            key = (height, width, x.device, x.dtype)
            if key not in self._resized:
                # tensors made in inference mode could not be used where gradients flow later
                with torch.inference_mode(False), torch.no_grad():
                    self._resized[key] = self._make(height, width, x)
            areas = self._resized[key]
        return torch.stack([areas[mask] for mask in masks])

    def _make(self, height: int, width: int, x: Tensor) -> Tensor:
        areas = [*(mask.resized(height, width) for mask in self.masks), torch.ones(height, width)]
        return torch.stack(areas).to(x.device, x.dtype)


def _halved(height: int, width: int) -> list[tuple[int, int]]:
    sizes = [(height, width)]
    while sizes[-1] != (1, 1):
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    return sizes


def _places_of_ids(ids: Any) -> tuple[int, int] | None:
    """Read the size off the last token's row and column, which a graph cannot."""
    if not isinstance(ids, Tensor) or torch.compiler.is_compiling():
        return None
    *_, row, column = ids.reshape(-1, ids.shape[-1])[-1].tolist()
    return int(row) + 1, int(column) + 1
