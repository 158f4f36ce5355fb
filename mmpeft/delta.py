"""The algebra of weight changes: what an adapter does to one layer's weight, whatever method made it.

Changes are float32, whatever comes in; norms, inner products and decompositions of factors are computed in float64,
which is cheap there. A convolution's weight (out, in, kh, kw) is seen as the matrix (out, in*kh*kw) and remembers
its shape; a vector (n,), such as a bias, is seen as (n, 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from mmpeft import low_rank
from mmpeft.errors import ConfigError

Side = Literal["output", "input"]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Give the shape of the matrix that a weight is seen as: (out, in*kh*kw); of a vector (n, 1)."""
    return shape[0], prod(shape[1:])


class Delta(ABC):
    """A change that is added to one layer's weight."""

    shape: tuple[int, ...]
    """the weight's shape: (out, in), (out, in, kh, kw) or (n,)"""

    @abstractmethod
    def dense(self) -> Tensor:
        """Build the whole change, in the weight's shape, float32; not to be changed in place."""

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

    Raises:
        ValueError: the factors do not make a matrix of this shape.
    """

    lora_B: Tensor
    lora_A: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        B, A = tuple(self.lora_B.shape), tuple(self.lora_A.shape)
        if len(B) != 2 or len(A) != 2 or B[1] != A[0] or (B[0], A[1]) != matrix_shape(self.shape):
            raise ValueError(f"factors {B} and {A} do not make a weight {tuple(self.shape)}")
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
        return float(max(inner(self, self), 0.0) ** 0.5)


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
        return float(torch.linalg.vector_norm(self.change, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Gain(Delta):
    """A multiplier of each output or input of the layer: diag(gain) @ W or W @ diag(gain).

    Args:
        gain: multiplier - 1, so that 0 changes nothing; (out,), or (in,) for side "input", which of a convolution
            are the input channels.
        weight: the base's weight, kept by reference and read when the change is built.

    Raises:
        ValueError: there is not one gain for each output or input.
    """

    gain: Tensor
    side: Side
    weight: Tensor

    def __post_init__(self) -> None:
        axis = 0 if self.side == "output" else 1
        if len(self.shape) <= axis or tuple(self.gain.shape) != (self.shape[axis],):
            raise ValueError(f"gain {tuple(self.gain.shape)} is not one per {self.side} of {self.shape}")
        object.__setattr__(self, "gain", self.gain.detach().float())

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The weight's shape."""
        return tuple(self.weight.shape)

    def dense(self) -> Tensor:
        """Build the gain times the weight, float32."""
        weight = self.weight.detach().float()
        axes = [-1, *[1] * (weight.ndim - 1)] if self.side == "output" else [1, -1, *[1] * (weight.ndim - 2)]
        return self.gain.to(weight.device).reshape(axes) * weight

    def scaled(self, factor: float) -> Gain:
        """Multiply the gain by a number."""
        return Gain(self.gain * factor, self.side, self.weight)

    def norm(self) -> float:
        """Give the Frobenius norm."""
        return Dense(self.dense()).norm()

    def acts_like(self, other: Gain) -> bool:
        """Whether it multiplies the same side of the same weight, so that the gains add up."""
        mine, theirs = self.weight, other.weight
        is_same = mine is theirs or (
            mine.data_ptr() == theirs.data_ptr() != 0
            and (mine.shape, mine.stride(), mine.dtype, mine.device)
            == (theirs.shape, theirs.stride(), theirs.dtype, theirs.device)
        )
        return is_same and self.side == other.side


@dataclass(frozen=True, eq=False)
class Sum(Delta):
    """Changes of different kinds that only together are an adapter's; made by `add`, and never nested."""

    parts: tuple[Delta, ...]
    shape: tuple[int, ...]

    def dense(self) -> Tensor:
        """Build the whole change, in the weight's shape, float32."""
        return reduce(torch.add, (part.dense().reshape(self.shape) for part in self.parts))

    def scaled(self, factor: float) -> Sum:
        """Multiply every part by a number."""
        return Sum(tuple(part.scaled(factor) for part in self.parts), self.shape)

    def norm(self) -> float:
        """Give the Frobenius norm."""
        return Dense(self.dense()).norm()


def add(deltas: Sequence[Delta]) -> Delta:
    """Add changes of one layer exactly.

    Low-rank changes stay low-rank, their ranks adding up; dense ones add up, and so do gains of one side of one
    weight. What is of different kinds becomes a Sum. A flattened shape (out, in*kh*kw) gives way to the weight's own.

    Raises:
        ValueError: none given, or shapes that differ.
    """
    shape = common_shape(deltas)
    parts = [part for delta in deltas for part in (delta.parts if isinstance(delta, Sum) else (delta,))]
    factors = [part for part in parts if isinstance(part, LowRank)]
    merged: list[Delta] = []
    if factors:
        B, A = torch.cat([f.lora_B for f in factors], 1), torch.cat([f.lora_A for f in factors])
        merged.append(LowRank(B, A, shape))
    merged += _merged_gains([part for part in parts if isinstance(part, Gain)])
    if rest := [part for part in parts if not isinstance(part, LowRank | Gain)]:
        merged.append(Dense(reduce(torch.add, (part.dense().reshape(shape) for part in rest))))
    return merged[0] if len(merged) == 1 else Sum(tuple(merged), shape)


def common_shape(deltas: Sequence[Delta]) -> tuple[int, ...]:
    """Give the one weight's shape that changes belong to, where some may only know the flattened matrix.

    Raises:
        ValueError: none given, or shapes of different weights.
    """
    if not deltas:
        raise ValueError("nothing to add")
    shapes = {tuple(delta.shape) for delta in deltas}
    shape = max(shapes, key=len)
    if shapes - {shape, matrix_shape(shape)}:
        raise ValueError(f"changes of one layer must have one shape; got {sorted(shapes)}")
    return shape


def inner(a: Delta, b: Delta) -> float:
    """Give the inner product Σ a_ij b_ij, in float64; of low-rank changes without building the matrix.

    Raises:
        ValueError: shapes that differ.
    """
    common_shape([a, b])
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        outputs, inputs = a.lora_B.double().T @ b.lora_B.double(), a.lora_A.double() @ b.lora_A.double().T
        return float((outputs * inputs).sum())
    return float(torch.dot(a.dense().double().flatten(), b.dense().double().flatten()))


def decompose(delta: Delta, most: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Give the thin singular value decomposition U diag(S) Vᵀ of a change seen as a matrix.

    Of a low-rank change in float64 without building it, see `low_rank.decompose_product`; any other is built and
    decomposed in float32.

    Args:
        most: how many singular vectors are wanted; none gives all.

    Returns:
        U (out, n), S (k,) falling, Vᵀ (n, in*kh*kw), float64; k is the least of rank, out and in*kh*kw, zeros included,
        and n is min(most, k).

    Raises:
        MethodError: the change has entries that are not finite numbers.
    """
    if isinstance(delta, LowRank):
        return low_rank.decompose_product(delta.lora_B, delta.lora_A, most)
    matrix = delta.dense().reshape(matrix_shape(delta.shape))
    low_rank.refuse_unless_finite(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :most].double(), low_rank.without_noise(S.double()), Vh[:most].double()


def truncate(
    delta: Delta, *, rank: int | None = None, error: float | None = None, energy: float | None = None
) -> tuple[LowRank, float]:
    """Give the closest change of a lower rank, and how far it is; no other is closer (`low_rank.relative_errors`).

    Where nothing is asked for, only singular values are dropped that vanish within float32's resolution. At least
    rank 1 stays.

    Args:
        rank: the most that the result may have, at least 1; a cap on what `error` and `energy` choose.
        error: take the smallest rank whose relative error is at most this, in [0, 1].
        energy: take the smallest rank that keeps this share of ‖delta‖², in [0, 1]; kohya's sv_fro f is energy f².

    Returns:
        The change, the square roots of the singular values on both factors, and the relative Frobenius error.

    Raises:
        ConfigError: a setting is out of its range.
        MethodError: the change has entries that are not finite numbers.
    """
    check_truncation(rank=rank, error=error, energy=energy)
    U, S, Vh = decompose(delta, rank)
    errors = low_rank.relative_errors(S)
    kept = min(low_rank.numerical_rank(S), len(S) if rank is None else rank)
    limits = [
        limit for limit in (error, None if energy is None else (1 - energy) ** 0.5) if limit is not None
    ]
    if limits:
        kept = min(kept, int((errors > min(limits)).sum()))
    kept = max(kept, 1)
    root = S[:kept].sqrt()
    return LowRank(U[:, :kept] * root, root[:, None] * Vh[:kept], delta.shape), float(errors[kept])


def check_truncation(*, rank: Any = None, error: Any = None, energy: Any = None) -> None:
    """Refuse a truncation that cannot be, as `truncate` does.

    Raises:
        ConfigError: `rank` is no whole number of at least 1, or `error` or `energy` no share.
    """
    if isinstance(rank, bool) or not isinstance(rank, int | None) or (rank is not None and rank < 1):
        raise ConfigError(f"rank: must be a whole number of at least 1; got {rank!r}")
    for name, value in (("error", error), ("energy", energy)):
        if isinstance(value, bool) or not isinstance(value, int | float | None) or not 0 <= (value or 0) <= 1:
            raise ConfigError(f"{name}: must be a share between 0 and 1; got {value!r}")


def principal_angles(a: LowRank, b: LowRank, side: Side = "output") -> Tensor:
    """Give the angles between the spaces of two changes' columns (outputs that they write) or rows (inputs they read).

    0 is a shared direction, π/2 one that the other never touches; see `low_rank.angles`.

    Returns:
        (min of the two numerical ranks,), radians in [0, π/2], rising, float64; empty if a change is zero.

    Raises:
        ValueError: shapes that differ.
        MethodError: a change has entries that are not finite numbers.
    """
    common_shape([a, b])
    return low_rank.angles(_basis(a, side), _basis(b, side))


def _basis(delta: LowRank, side: Side) -> Tensor:
    U, S, Vh = decompose(delta)
    kept = low_rank.numerical_rank(S)
    return U[:, :kept] if side == "output" else Vh[:kept].T


def _merged_gains(gains: list[Gain]) -> list[Gain]:
    merged: list[Gain] = []
    for gain in gains:
        for i, known in enumerate(merged):
            if known.acts_like(gain):
                merged[i] = Gain(known.gain + gain.gain, known.side, known.weight)
                break
        else:
            merged.append(gain)
    return merged
