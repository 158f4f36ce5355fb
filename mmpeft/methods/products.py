"""Exact forms of the products of factors that LoCon, LoHa and LoKr are made of."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from mmpeft.delta import Dense, LowRank


def tucker(core: Tensor, lora_A: Tensor) -> Tensor:
    """Give the lower factor of a Tucker-decomposed convolution as one matrix, float32.

    Args:
        core: (rank, rank, kh, kw).
        lora_A: (rank, in), or (rank, in, 1, 1).

    Returns:
        (rank, in*kh*kw).
    """
    lower = torch.einsum("mn...,ni->mi...", core.detach().float(), lora_A.detach().float().flatten(1))
    return lower.flatten(1)


def shortest(lora_B: Tensor, lora_A: Tensor, shape: tuple[int, ...]) -> LowRank | Dense:
    """Give lora_B @ lora_A, low-rank where that takes fewer numbers than the whole matrix.

    Args:
        lora_B: (out, rank).
        lora_A: (rank, in), for a convolution (rank, in*kh*kw).
        shape: the weight's.
    """
    if lora_B.numel() + lora_A.numel() < prod(shape):
        return LowRank(lora_B, lora_A, shape)
    return Dense((lora_B.detach().float() @ lora_A.detach().float()).reshape(shape))
