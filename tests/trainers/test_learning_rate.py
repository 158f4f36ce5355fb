import pytest

from mmpeft.trainers.learning_rate import factor


def rates(schedule, steps, warmup_steps=0):
    return [factor(schedule, step, steps=steps, warmup_steps=warmup_steps) for step in range(steps)]


def test_warm_up_rises_evenly_and_loses_no_step():
    assert rates("constant", 6, 4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_what_would_be_zero_after_the_last_step():
    assert rates("linear", 4) == [1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_way_down_in_the_middle():
    found = rates("cosine", 8, 2)
    assert found[2] == 1.0
    assert found[5] == pytest.approx(0.5)
    assert 0 < found[7] < found[6] < found[5]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run_never_reaches_the_peak(schedule):
    assert rates(schedule, 2, 4) == [0.25, 0.5]
