"""ZipLoRA: a coefficient for each column of each change, so that they get out of each other's way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.composition.terms import Terms, refuse_unusable
from mmpeft.delta import Delta, Dense, LowRank, add, common_shape, decompose, matrix_shape
from mmpeft.errors import ConfigError
from mmpeft.low_rank import numerical_rank

# Of a change of high rank the strongest directions stand for its inputs.
_MOST_PROBES = 64


def zip_columns(deltas: Terms, *, stiffness: float = 0.3, overlap: float = 0.01, steps: int = 100) -> Delta:
    """Scale the columns of the changes so that each keeps its output on what it reads, and columns are shared less.

    M = Σ_j w_j Δ_j diag(m_j), where m_j (in,) has one number for each input column and minimises
    Σ_i ‖(M - w_i Δ_i) X_i‖² / ‖w_i Δ_i X_i‖² + stiffness · Σ_i ‖m_i - 1‖² / in
    + overlap · the mean over pairs of |m_i · m_j| / in.
    Shah et al. 2023, "ZipLoRA: Any Subject in Any Style by Effectively Merging LoRAs", arXiv:2311.13600, whose first
    term runs the models on each adapter's own prompts. No data is there when adapters are composed, so the change
    stands for it: X_i = Δ_iᵀ, since gradient descent makes a change's rows of the inputs that it trains on. The second
    term, not in the paper, keeps the many coefficients from fitting those few inputs at the cost of all others.
    Changes that read different inputs hardly change, as in `sum`; the same change twice answers them about once.

    Solved from all ones by L-BFGS, without randomness, on the factors: Δ_j diag(m_j) = B_j (A_j diag(m_j)), so that
    low-rank stays low-rank, the ranks adding up. Of a change of rank above 64 the 64 strongest directions make X_i.

    Args:
        stiffness: how strongly the coefficients are held at 1, > 0; the larger, the closer to `sum`.
        overlap: how much shared columns cost, >= 0; the paper's λ, there 0.01.
        steps: the most that the solver takes, at least 1.

    Raises:
        ConfigError: a setting is out of its range, or a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
    """
    if not (stiffness > 0 and overlap >= 0 and steps >= 1):
        raise ConfigError(
            f"zip needs stiffness above 0, overlap of at least 0 and steps of at least 1; "
            f"got {stiffness}, {overlap} and {steps}"
        )
    refuse_unusable(deltas)
    parts = [_Part.of(delta, weight) for delta, weight in deltas]
    moving = [i for i, part in enumerate(parts) if part.size > 0]
    coefficients = torch.ones(len(parts), matrix_shape(deltas[0][0].shape)[1])
    if len(moving) > 1:
        coefficients[moving] = _solve([parts[i] for i in moving], stiffness, overlap, steps)
    shape = common_shape([delta for delta, _ in deltas])
    scaled = [
        _with_columns(delta, column, shape).scaled(weight)
        for (delta, weight), column in zip(deltas, coefficients, strict=True)
    ]
    return add(scaled)


@dataclass(frozen=True)
class _Part:
    writes: Tensor  # (out, k) with orthonormal columns
    reads: Tensor  # (k, in): weight · Δ = writes @ reads
    probes: Tensor  # (in, p): inputs X, scaled so that what the part answers to them has norm 1
    size: float  # ‖weight · Δ X‖ before that scaling

    @classmethod
    def of(cls, delta: Delta, weight: float) -> _Part:
        U, S, Vh = decompose(delta)
        kept = max(1, numerical_rank(S))
        U, S, Vh = U[:, :kept], S[:kept], Vh[:kept]
        probes = (S[:_MOST_PROBES, None] * Vh[:_MOST_PROBES]).T
        size = abs(weight) * float(S[:_MOST_PROBES].square().norm())
        return cls(U.float(), (weight * S[:, None] * Vh).float(), (probes / (size or 1.0)).float(), size)


def _solve(parts: list[_Part], stiffness: float, overlap: float, steps: int) -> Tensor:
    """Minimise the objective over the coefficients, (n, in), float32."""
    owner = torch.cat([torch.full((len(part.reads),), i) for i, part in enumerate(parts)])
    reads, probes = torch.cat([part.reads for part in parts]), torch.cat([part.probes for part in parts], 1)
    # an orthonormal basis of all outputs leaves the norms as they are
    core = torch.linalg.qr(torch.cat([part.writes for part in parts], 1), mode="r").R
    targets = torch.cat([core[:, owner == i] @ (p.reads @ p.probes) for i, p in enumerate(parts)], 1)
    coefficients = torch.ones(len(parts), reads.shape[1])
    hold = stiffness / reads.shape[1]
    price = overlap / (reads.shape[1] * len(parts) * (len(parts) - 1) / 2)

    def evaluate() -> Tensor:
        moved = coefficients - 1
        missed = core @ ((reads * coefficients[owner]) @ probes) - targets
        slope = reads * ((2 * core.T @ missed) @ probes.T)
        shared = (coefficients @ coefficients.T).fill_diagonal_(0)
        coefficients.grad = torch.zeros_like(coefficients).index_add_(0, owner, slope)
        coefficients.grad += price * shared.sign() @ coefficients + 2 * hold * moved
        value: Tensor = missed.square().sum() + hold * moved.square().sum() + price * shared.abs().sum() / 2
        return value

    torch.optim.LBFGS([coefficients], max_iter=steps, line_search_fn="strong_wolfe").step(evaluate)
    return coefficients


def _with_columns(delta: Delta, columns: Tensor, shape: tuple[int, ...]) -> Delta:
    """Give Δ diag(columns)."""
    if isinstance(delta, LowRank):
        return LowRank(delta.lora_B, delta.lora_A * columns, shape)
    return Dense((delta.dense().reshape(matrix_shape(shape)) * columns).reshape(shape))
