"""What every strategy is given: the changes of one layer, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft.delta import Delta, common_shape
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


def weighted_changes(terms: Terms) -> list[Tensor]:
    """Build each change times its weight, all in the weight's shape, float32.

    Raises:
        ConfigError: a weight is not a finite number.
        MethodError: a change has entries that are not finite numbers.
        ValueError: no change was given, or changes of different weights' shapes.
    """
    refuse_unusable(terms)
    shape = common_shape([delta for delta, _ in terms])
    return [delta.dense().reshape(shape) * weight for delta, weight in terms]


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
        refuse_unless_finite(torch.tensor(delta.norm()))
