"""What every strategy is given: the changes of one layer, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmpeft.delta import Delta, LowRank, common_shape
from mmpeft.errors import ConfigError
from mmpeft.low_rank import refuse_unless_finite

Terms = Sequence[tuple[Delta, float]]


def weighted(terms: Terms) -> list[Delta]:
    """Scale each change by its weight.

    Raises:
        ConfigError: a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
        ValueError: no change was given, or changes of different weights' shapes.
    """
    refuse_unusable(terms)
    return [delta.scaled(weight) for delta, weight in terms]


def weighted_changes(terms: Terms) -> Iterator[Tensor]:
    """Build one change after another times its weight, all in the weight's shape, float32.

    Raises:
        ConfigError: a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
        ValueError: no change was given, or changes of different weights' shapes.
    """
    refuse_unusable(terms)
    shape = common_shape([delta for delta, _ in terms])
    for delta, weight in terms:
        yield delta.dense().reshape(shape) * weight


def refuse_unusable(terms: Terms) -> None:
    """Refuse what no strategy can compute with.

    Raises:
        ConfigError: a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
        ValueError: no change was given, or changes of different weights' shapes.
    """
    common_shape([delta for delta, _ in terms])
    for delta, weight in terms:
        if not math.isfinite(weight):
            raise ConfigError(f"an adapter's weight must be a finite number; got {weight}")
        # norms are finite where all entries are, and cheaper to look at
        for tensor in (delta.lora_B, delta.lora_A) if isinstance(delta, LowRank) else (delta.dense(),):
            refuse_unless_finite(torch.linalg.vector_norm(tensor, dtype=torch.float64))
