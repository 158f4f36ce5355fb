"""Which row of a batch belongs to which prompt and to which branch of guidance, and what weights say about each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmpeft.errors import BankError
from mmpeft.mix import Weight

Guidance = Literal["none", "uncond_first", "uncond"]


@dataclass(frozen=True)
class BatchLayout:
    """Which row of a batch belongs to which prompt; the rows of one prompt lie together.

    Args:
        prompts: how many prompts there are.
        per_prompt: rows of each prompt: pictures, beams, or returned sequences.
        guidance: "none": every row is conditional; "uncond_first": all rows once unconditional, then once conditional,
            in one batch; "uncond": every row is unconditional (as when negative prompts are encoded).
        places: (h, w) of the picture's tokens, for denoisers that are fed tokens and not told their places.

    Raises:
        BankError: fewer than one prompt or row, or another word for guidance.
    """

    prompts: int
    per_prompt: int = 1
    guidance: Guidance = "none"
    places: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.per_prompt < 1:
            raise BankError(
                f"a batch has at least one prompt and one row of each; got {self.prompts} prompts with "
                f"{self.per_prompt} rows each"
            )
        if self.guidance not in ("none", "uncond_first", "uncond"):
            raise BankError(
                f"the guidance of a batch is 'none', 'uncond_first' or 'uncond'; got {self.guidance!r}"
            )

    @property
    def rows(self) -> int:
        """How many rows the batch has."""
        return self.prompts * self.per_prompt * (2 if self.guidance == "uncond_first" else 1)


def needs_layout(weights: Sequence[Weight]) -> bool:
    """Tell whether any weight depends on the row of the batch."""
    return any(weight.samples is not None or weight.conditional_only for weight in weights)


def check_samples(weights: Sequence[Weight], layout: BatchLayout | None) -> None:
    """Refuse weights per sample that are not as many as there are prompts.

    Raises:
        BankError: so.
    """
    for weight in weights:
        if layout is not None and weight.samples is not None and not _fits(weight, layout):
            raise BankError(
                f"weights per sample are one for each prompt: there are {layout.prompts} prompts and "
                f"{len(weight.samples)} weights"
            )


def factors_of_rows(weights: Sequence[Weight], layout: BatchLayout | None) -> Tensor | None:
    """Give each row's factors, a column for each weight.

    Returns:
        (rows, n), float32; (1, n) where the row does not matter; None where it does and no layout that fits is known.
    """
    if not needs_layout(weights):
        return torch.ones(1, len(weights))
    if layout is None or not all(_fits(weight, layout) for weight in weights):
        return None
    columns = [weight.samples or (1.0,) * layout.prompts for weight in weights]
    conditional = torch.tensor(columns).T.repeat_interleave(layout.per_prompt, 0)
    if layout.guidance == "none":
        return conditional
    unconditional = conditional * torch.tensor([float(not weight.conditional_only) for weight in weights])
    return torch.cat([unconditional, conditional]) if layout.guidance == "uncond_first" else unconditional


def _fits(weight: Weight, layout: BatchLayout) -> bool:
    return weight.samples is None or len(weight.samples) == layout.prompts
