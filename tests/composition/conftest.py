"""Seeded changes of one layer for the strategies' tests."""

import pytest
import torch

from mmpeft.delta import LowRank, matrix_shape


@pytest.fixture(scope="session")
def low_rank():
    """A function that draws a low-rank change of a weight's shape."""

    def draw(shape, rank, seed, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = matrix_shape(shape)
        B = torch.randn(rows, rank, generator=generator)
        A = torch.randn(rank, columns, generator=generator)
        return LowRank(B.to(dtype), A.to(dtype), shape)

    return draw
