from collections import Counter
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.data.batches import StepBatch, share, step_batch, steps_per_epoch
from mmpeft.errors import DataError

GROUPS = st.lists(st.sampled_from(["wide", "square", "tall"]), min_size=1, max_size=60)


def epoch_of(groups, step_size, seed, epoch):
    count = steps_per_epoch(groups, step_size)
    return [step_batch(groups, step_size, seed, step) for step in range(epoch * count, (epoch + 1) * count)]


@given(GROUPS, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_every_epoch_visits_every_sample_once_in_steps_of_one_group(groups, step_size, seed, epoch):
    batches = epoch_of(groups, step_size, seed, epoch)
    assert {batch.epoch for batch in batches} == {epoch}
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(groups)))
    assert all(len({groups[index] for index in batch.indices}) == 1 for batch in batches)
    short = Counter(groups[batch.indices[0]] for batch in batches if len(batch.indices) < step_size)
    assert all(count == 1 for count in short.values())


@given(GROUPS, st.integers(1, 9))
def test_steps_per_epoch_counts_short_steps(groups, step_size):
    assert steps_per_epoch(groups, step_size) == sum(
        -(-count // step_size) for count in Counter(groups).values()
    )


def test_a_step_is_the_same_whenever_it_is_asked_for():
    groups = ("a", "b") * 30
    forwards = [step_batch(groups, 4, 7, step) for step in range(100)]
    assert [step_batch(list(groups), 4, 7, step) for step in reversed(range(100))] == forwards[::-1]


def test_epochs_and_seeds_have_other_orders():
    groups = ["a"] * 20 + ["b"] * 20
    orders = [tuple(epoch_of(groups, 4, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(batch.indices for batch in order) for order in orders}) == 4


def test_groups_are_mixed_within_an_epoch():
    groups = ["a"] * 40 + ["b"] * 40
    kinds = [groups[batch.indices[0]] for batch in epoch_of(groups, 4, 0, 0)]
    assert 5 < sum(one != other for one, other in pairwise(kinds)) < 19


def test_no_sample_is_an_error():
    with pytest.raises(DataError, match="no sample"):
        step_batch([], 4, 0, 0)


@given(st.integers(1, 24), st.integers(1, 5), st.integers(1, 4))
def test_processes_share_a_step_without_gap_or_overlap(samples, batch_size, processes):
    batch = StepBatch(0, tuple(range(100, 100 + samples)))
    shares = [share(batch, batch_size, processes, rank) for rank in range(processes)]
    dealt = [pair for micro_batches in shares for micro_batch in micro_batches for pair in micro_batch]
    assert sorted(dealt) == list(enumerate(batch.indices))
    assert all(
        0 < len(micro_batch) <= batch_size for micro_batches in shares for micro_batch in micro_batches
    )
    # No process waits for another by more than one micro-batch.
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("samples", [4, 3, 2, 1])
def test_four_is_two_accumulated_twice_is_two_on_two_processes(samples):
    batch = StepBatch(2, (9, 5, 7, 1)[:samples])
    (whole,) = share(batch, 4)
    accumulated = share(batch, 2)
    spread = [micro_batch for rank in (0, 1) for micro_batch in share(batch, 2, 2, rank)]
    assert list(chain(*accumulated)) == whole == list(chain(*spread))
    assert accumulated == spread


def test_a_process_may_get_nothing():
    assert share(StepBatch(0, (3,)), 2, 2, 1) == []
