"""Which samples an optimiser step trains on, and who of the processes takes which of them."""

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

from mmpeft import randomness
from mmpeft.errors import DataError


class StepBatch(NamedTuple):
    """The samples of one optimiser step, over all processes and micro-batches; all of one group."""

    epoch: int
    indices: tuple[int, ...]


def step_batch(groups: Sequence[Hashable], step_size: int, seed: int, step: int) -> StepBatch:
    """Name the samples of an optimiser step, as a function of the numbers given and of nothing else.

    Each epoch visits each sample once. It is planned as a whole: the samples are shuffled, cut within each group
    into steps of `step_size` (the last one of a group may be shorter: nothing is dropped or repeated to fill it), and
    the steps are shuffled.

    Args:
        groups: of each sample what it has in common with those that may share a step: its bucket. An image that is
            repeated n times stands here n times.
        step_size: samples of a full step: batch size x accumulation x processes.
        seed: of the run.
        step: from 0, counted over all epochs.

    Raises:
        DataError: there is no sample.
    """
    groups = tuple(groups)
    epoch, place = divmod(step, steps_per_epoch(groups, step_size))
    return StepBatch(epoch, _epoch_plan(groups, step_size, seed, epoch)[place])


def steps_per_epoch(groups: Sequence[Hashable], step_size: int) -> int:
    """Count the optimiser steps that visit every sample once, short ones included.

    Raises:
        DataError: there is no sample.
    """
    return _count_steps(tuple(groups), step_size)


def share(
    batch: StepBatch, batch_size: int, processes: int = 1, rank: int = 0
) -> list[list[tuple[int, int]]]:
    """Deal a step's samples out and give the micro-batches of one process, each as (position in the step, sample).

    The step is cut into micro-batches of `batch_size`, which go to the processes in turn. However it is split, the same
    positions come up: draws that are keyed by the position do not depend on the split.

    Returns:
        Micro-batches, none of them empty. A short step may leave a process with fewer than others, or with none.
    """
    places = list(enumerate(batch.indices))
    micro_batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    return micro_batches[rank::processes]


@lru_cache(maxsize=8)
def _count_steps(groups: tuple[Hashable, ...], step_size: int) -> int:
    if not groups:
        raise DataError("there is no sample to train on")
    counts: dict[Hashable, int] = {}
    for group in groups:
        counts[group] = counts.get(group, 0) + 1
    return sum(-(-count // step_size) for count in counts.values())


@lru_cache(maxsize=8)
def _epoch_plan(groups: tuple[Hashable, ...], step_size: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    members: dict[Hashable, list[int]] = {}
    for index in randomness.permutation(len(groups), seed, "samples", epoch):
        members.setdefault(groups[index], []).append(index)
    steps = [
        tuple(order[start : start + step_size])
        for order in members.values()
        for start in range(0, len(order), step_size)
    ]
    return [steps[place] for place in randomness.permutation(len(steps), seed, "steps", epoch)]
