"""Linear algebra of products B A that are never built, in float64: singular values, orthonormal bases, angles."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.errors import MethodError

# Singular values below this share of the largest are lost when factors are rounded to float32.
_RESOLUTION = float(torch.finfo(torch.float32).eps)
# Cholesky's Q is orthogonal to κ² times float64's rounding: 1e-8 for this κ of the columns, scaled to one length.
_WELL_CONDITIONED = 1e4


def decompose_product(
    lora_B: Tensor, lora_A: Tensor, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the thin singular value decomposition U diag(S) Vᵀ of B A.

    B = Q_B R_B, Aᵀ = Q_A R_A, and the decomposition of the small R_B R_Aᵀ: the cost grows with (out + in) rank² where
    that of the dense matrix grows with out in min(out, in).

    Args:
        lora_B: (out, rank).
        lora_A: (rank, in).
        most: how many singular vectors are wanted; none gives all.

    Returns:
        U (out, n), S (k,) falling, Vᵀ (n, in), float64; k is min(rank, out, in), zeros included; n is min(most, k).

    Raises:
        MethodError: a factor has entries that are not finite numbers.
    """
    columns, inner_B, R_B = _orthonormal(lora_B.double())
    rows, inner_A, R_A = _orthonormal(lora_A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return columns @ (inner_B @ U[:, :most]), S, (Vh[:most] @ inner_A.T) @ rows.T


def numerical_rank(values: Tensor) -> int:
    """Count the singular values, given falling, (k,), that float32 can tell from zero beside the largest."""
    return int((values > _RESOLUTION * values[:1]).sum())


def without_noise(values: Tensor) -> Tensor:
    """Set to 0 the singular values, given falling, (k,), that a float32 decomposition makes of zeros.

    Measured up to 6 times float32's resolution of the largest, for matrices up to 1280 x 1280 and 320 x 2880.
    """
    return torch.where(values > 16 * _RESOLUTION * values[:1], values, 0)


def relative_errors(S: Tensor) -> Tensor:
    """Give the relative Frobenius error of keeping only the first 0, 1, ... k singular values, (k + 1,).

    sqrt(Σ_{i>r} s_i² / Σ s_i²), which no other matrix of rank r beats. Eckart and Young 1936, "The Approximation of One
    Matrix by Another of Lower Rank".
    """
    tails = torch.cat([S.square().flip(0).cumsum(0).flip(0), S.new_zeros(1)])
    return (tails / tails[0].clamp(min=torch.finfo(S.dtype).tiny)).sqrt()


def angles(one: Tensor, other: Tensor) -> Tensor:
    """Give the principal angles between two spaces.

    Cosines are the singular values of Q₁ᵀQ₂; small angles come from their sines, which keep their digits. Björck and
    Golub 1973, "Numerical Methods for Computing Angles Between Linear Subspaces", section 4.

    Args:
        one: an orthonormal basis, (n, k), float64.
        other: another, (n, l).

    Returns:
        (min(k, l),), radians in [0, π/2], rising.
    """
    wide, narrow = (one, other) if one.shape[1] >= other.shape[1] else (other, one)
    shared = wide.T @ narrow
    cosines = torch.linalg.svdvals(shared).clamp(0, 1)
    sines = torch.linalg.svdvals(narrow - wide @ shared).clamp(0, 1).flip(0)
    return torch.where(cosines**2 >= 0.5, sines.asin(), cosines.acos())


def refuse_unless_finite(numbers: Tensor) -> None:
    """Refuse nan and infinity, in norms as well as it does in the entries.

    Raises:
        MethodError: there are some.
    """
    if not torch.isfinite(numbers).all():
        raise MethodError(
            "the change has entries that are not finite numbers (nan or infinite): its training went wrong or its file "
            "is broken; take another checkpoint"
        )


def _orthonormal(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split columns (n, k) into (vectors @ coefficients) @ R, where the bracket's columns are orthonormal.

    Cholesky's way where the columns are well apart: it leaves the big product to the caller, who may want few of them.
    """
    gram = columns.T @ columns
    lengths = gram.diagonal().sqrt()
    refuse_unless_finite(lengths)
    # columns that vanish or depend on each other give nan, or an inverse that is too long
    L, _ = torch.linalg.cholesky_ex(gram / torch.outer(lengths, lengths))
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False)
    if len(L) <= len(columns) and torch.linalg.matrix_norm(inverse) < _WELL_CONDITIONED:
        return columns, (inverse / lengths).T, L.T * lengths
    Q, R = torch.linalg.qr(columns)
    return Q, torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device), R
