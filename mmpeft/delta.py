"""The algebra of weight changes: what an adapter does to one layer's weight, whatever method made it.

Everything is float32 inside, whatever comes in. A convolution's weight (out, in, kh, kw) is seen as the matrix
(out, in*kh*kw) and remembers its shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Delta(ABC):
    """A change that is added to one layer's weight."""

    shape: tuple[int, ...]
    """the weight's shape: (out, in), or (out, in, kh, kw)"""

    @abstractmethod
    def dense(self) -> Tensor:
        """Build the whole change, in the weight's shape, float32."""

    @abstractmethod
    def scaled(self, factor: float) -> Delta:
        """Multiply the change by a number."""

    @abstractmethod
    def norm(self) -> float:
        """Give the Frobenius norm."""


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """B @ A, the scale folded into B.

    Args:
        lora_B: (out, rank).
        lora_A: (rank, in), for a convolution (rank, in*kh*kw).
        shape: the weight's shape.
    """

    lora_B: Tensor
    lora_A: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_B", self.lora_B.detach().float())
        object.__setattr__(self, "lora_A", self.lora_A.detach().float())

    @property
    def rank(self) -> int:
        """The inner dimension; the matrix rank is at most this."""
        return self.lora_A.shape[0]

    def dense(self) -> Tensor:
        """Build B @ A in the weight's shape, float32."""
        return (self.lora_B @ self.lora_A).reshape(self.shape)

    def scaled(self, factor: float) -> LowRank:
        """Multiply B by a number."""
        return LowRank(self.lora_B * factor, self.lora_A, self.shape)

    def norm(self) -> float:
        """Give ‖B A‖ as sqrt(tr(BᵀB AAᵀ)), in float64, without building the matrix."""
        B, A = self.lora_B.double(), self.lora_A.double()
        return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """A change that has every entry of its own, in the weight's shape."""

    change: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "change", self.change.detach().float())

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The weight's shape."""
        return tuple(self.change.shape)

    def dense(self) -> Tensor:
        """Give the change itself."""
        return self.change

    def scaled(self, factor: float) -> Dense:
        """Multiply every entry by a number."""
        return Dense(self.change * factor)

    def norm(self) -> float:
        """Give the Frobenius norm."""
        return float(self.change.double().norm())


def add(deltas: list[Delta]) -> Delta:
    """Add changes of one layer: exactly, the ranks adding up while all are low-rank, else dense.

    Raises:
        ValueError: none given, or shapes that differ.
    """
    if not deltas:
        raise ValueError("nothing to add")
    shape = deltas[0].shape
    if any(delta.shape != shape for delta in deltas):
        raise ValueError(f"changes of one layer must have one shape; got {[delta.shape for delta in deltas]}")
    if all(isinstance(delta, LowRank) for delta in deltas):
        factors = [delta for delta in deltas if isinstance(delta, LowRank)]
        return LowRank(
            torch.cat([f.lora_B for f in factors], 1), torch.cat([f.lora_A for f in factors], 0), shape
        )
    return Dense(torch.stack([delta.dense() for delta in deltas]).sum(0))
