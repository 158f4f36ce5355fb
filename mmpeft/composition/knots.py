"""KnOTS: TIES in the basis that the changes share."""

import torch
from torch import Tensor

from mmpeft.composition.entries import check_share, largest, merge_agreeing
from mmpeft.composition.terms import Terms, refuse_unusable
from mmpeft.delta import Delta, Dense, LowRank, common_shape, decompose, matrix_shape
from mmpeft.low_rank import decompose_product, numerical_rank


def knots(deltas: Terms, *, density: float = 0.5, normalize: bool = True) -> Delta:
    """Merge the changes by TIES where they are aligned: in the joint basis of their outputs.

    [Δ_1 ... Δ_n] = U S [V_1 ... V_n]; the result is U S · ties(V_1 ... V_n), see `ties` for its terms and for what the
    weights, which multiply the V_i, mean. Stoica et al. 2024, "Model merging with SVD to tie the Knots",
    arXiv:2410.19735, section 4. Of low-rank changes no dense matrix is built: the decomposition is that of
    [B_1 ... B_n] diag(A_1 ... A_n), each V_i is (R, in) for the total rank R, and the result has at most rank R.

    Args:
        density: share of each V_i's entries to keep, in (0, 1].
        normalize: whether to take the mean of those that agree instead of their sum.

    Raises:
        ConfigError: `density` is out of its range, or a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
    """
    check_share("density", density)
    refuse_unusable(deltas)
    shape = common_shape([delta for delta, _ in deltas])
    U, S, Vh = _joint([delta for delta, _ in deltas])
    # without noise directions, whose entries would count among the largest; a change that is all zero keeps one
    kept = max(1, numerical_rank(S))
    blocks = Vh[:kept].float().chunk(len(deltas), dim=1)
    trimmed = [largest(block * weight, density) for block, (_, weight) in zip(blocks, deltas, strict=True)]
    return LowRank(U[:, :kept] * S[:kept], merge_agreeing(trimmed, normalize=normalize), shape)


def _joint(deltas: list[Delta]) -> tuple[Tensor, Tensor, Tensor]:
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) == len(deltas):
        return decompose_product(
            torch.cat([f.lora_B for f in factors], 1), torch.block_diag(*[f.lora_A for f in factors])
        )
    return decompose(Dense(torch.cat([d.dense().reshape(matrix_shape(d.shape)) for d in deltas], 1)))
