"""Every random draw as a function of (seed, what it is for, where it happens).

No generator lives longer than the draw it was made for, so nothing about randomness has to be saved: a run
that was killed draws the same numbers again. Draws happen on the CPU in float32, so that devices and process
counts do not change them.
"""

import hashlib
import random

import numpy as np
import torch
from torch import Tensor

Key = int | str


def seed_of(seed: int, *keys: Key) -> int:
    """Hash a seed and the keys of a draw into a 63-bit seed; any change of any key gives an unrelated one."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: Key) -> torch.Generator:
    """Make a fresh CPU generator for one draw, seeded from `seed_of(seed, *keys)`."""
    return torch.Generator().manual_seed(seed_of(seed, *keys))


def normal(shape: tuple[int, ...], seed: int, *keys: Key) -> Tensor:
    """Draw standard normal noise of a shape, float32, on the CPU."""
    return torch.randn(shape, generator=generator(seed, *keys))


def uniform(shape: tuple[int, ...], seed: int, *keys: Key) -> Tensor:
    """Draw uniform numbers in [0, 1) of a shape, float32, on the CPU."""
    return torch.rand(shape, generator=generator(seed, *keys))


def permutation(count: int, seed: int, *keys: Key) -> list[int]:
    """Draw an order of 0 .. count-1."""
    order: list[int] = torch.randperm(count, generator=generator(seed, *keys)).tolist()
    return order


def reseed_globals(seed: int, *keys: Key) -> None:
    """Seed the process-wide generators (dropout draws from them) for one place of a run."""
    value = seed_of(seed, *keys)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)
