"""Orthogonal composition: later adapters lose what earlier ones already say."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mmpeft.composition.entries import check_share
from mmpeft.composition.terms import Terms, refuse_unusable
from mmpeft.delta import Delta, Dense, LowRank, add, common_shape, decompose, matrix_shape
from mmpeft.low_rank import relative_errors

# Directions of several changes that differ by less than this angle count as one.
_SAME_DIRECTION = 1e-5


def orthogonal(deltas: Terms, *, share: float = 0.99) -> Delta:
    """Add the changes in their order, each without what lies in the spaces of the earlier ones.

    Σ_i w_i (Δ_i - P Δ_i Q): P projects on all outputs that the earlier changes write (the span of their columns), Q on
    all inputs that they read (the span of their rows). What is taken away is the part of Δ_i that reads what they read
    and writes where they write, so the inner product with each earlier change becomes 0; the same adapter a second time
    adds nothing; what only shares outputs or only inputs stays. The idea is that of O-LoRA, there a loss in training:
    Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning", arXiv:2310.14152.

    The order matters: the first change stays whole. Low-rank stays low-rank, each later rank at most doubling.

    Args:
        share: how much of an earlier change's ‖Δ‖² the directions make up that count as its spaces, strongest first, in
            (0, 1]. At 1 the inner products are 0 exactly, but a change of full rank leaves nothing to later ones.

    Raises:
        ConfigError: `share` is out of its range, or a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
    """
    check_share("share", share)
    refuse_unusable(deltas)
    shape = common_shape([delta for delta, _ in deltas])
    outputs, inputs = (torch.zeros(size, 0, dtype=torch.float64) for size in matrix_shape(shape))
    parts = []
    for i, (delta, weight) in enumerate(deltas):
        parts.append(_without(delta, outputs, inputs).scaled(weight))
        if i < len(deltas) - 1:
            U, S, Vh = decompose(delta)
            # float32's rounding is no direction
            kept = int((relative_errors(S)[:-1] > max((1 - share) ** 0.5, 1e-6)).sum())
            outputs, inputs = _joined(outputs, U[:, :kept]), _joined(inputs, Vh[:kept].T)
    return add(parts)


def _without(delta: Delta, outputs: Tensor, inputs: Tensor) -> Delta:
    """Give Δ - P Δ Q for orthonormal bases (out, k) and (in, l) of the two spaces."""
    if not outputs.shape[1]:
        return delta
    if isinstance(delta, LowRank):
        B, A = delta.lora_B.double(), delta.lora_A.double()
        inside = outputs @ (outputs.T @ B)
        # (B - P B) A + P B (A - A Q): what cancels does so before it is rounded
        factors = torch.cat([B - inside, inside], 1), torch.cat([A, A - (A @ inputs) @ inputs.T])
        return LowRank(*factors, delta.shape)
    matrix = delta.dense().double().reshape(matrix_shape(delta.shape))
    inside = outputs @ ((outputs.T @ matrix) @ inputs) @ inputs.T
    return Dense((matrix - inside).reshape(delta.shape))


def _joined(basis: Tensor, more: Tensor) -> Tensor:
    """Give an orthonormal basis of two spaces together."""
    U, S, _ = torch.linalg.svd(torch.cat([basis.to(more), more], 1), full_matrices=False)
    return cast(Tensor, U[:, S > _SAME_DIRECTION])
