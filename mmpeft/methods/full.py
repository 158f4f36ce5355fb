"""Full differences: every entry of a weight has a change of its own.

W' = W + diff. The form of what has no shorter one: fully trained layers, norms and biases (BitFit), and compositions
that need every entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmpeft.delta import Delta, Dense
from mmpeft.layer_adapter import LayerAdapter


@dataclass(frozen=True, eq=False)
class FullLayer(LayerAdapter):
    """The change of one weight, of one norm's gain, or of one bias.

    Args:
        diff: in the shape of what it changes: (out, in), (out, in, kh, kw), or (n,).
    """

    diff: Tensor
    method: ClassVar[str] = "full"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it changes."""
        return tuple(self.diff.shape)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The difference: diff."""
        return {"diff": self.diff}

    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give the difference itself, dense; the base's weight is not needed."""
        return Dense(self.diff)
