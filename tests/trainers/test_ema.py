import torch
from torch import nn

from mmpeft.trainers.ema import MovingAverage


def test_it_averages_with_a_decay_that_warms_up():
    parameter = nn.Parameter(torch.zeros(3))
    average = MovingAverage({"a": parameter}, decay=0.15)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update(0)  # decay 1/10
    assert torch.allclose(average.averages["a"], torch.full((3,), 0.9))
    average.update(5)  # 6/15 would exceed 0.15
    assert torch.allclose(average.averages["a"], torch.full((3,), 1 - 0.1 * 0.15))


def test_the_parameters_come_back_bit_for_bit_also_after_an_error():
    parameter = nn.Parameter(torch.tensor([0.1, float("inf"), -0.0]))
    average = MovingAverage({"a": parameter}, decay=0.5)
    average.averages["a"].fill_(7.0)
    before, pointer = parameter.detach().clone().view(torch.int32), parameter.data_ptr()
    try:
        with average.in_place():
            assert torch.equal(parameter, torch.full((3,), 7.0))
            raise InterruptedError
    except InterruptedError:
        pass
    assert torch.equal(parameter.detach().view(torch.int32), before)
    assert parameter.data_ptr() == pointer
