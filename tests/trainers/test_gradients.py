import pytest
import torch
from torch import nn

from mmpeft.errors import TrainingError
from mmpeft.trainers import launch
from mmpeft.trainers.gradients import StepGradient
from mmpeft.trainers.task import ParameterGroup


def two_groups(dtype=torch.float32):
    torch.manual_seed(0)
    # 15 and 3 numbers: neither fills whole lanes of the buffer.
    first, second = nn.Parameter(torch.randn(3, 5, dtype=dtype)), nn.Parameter(torch.randn(3, dtype=dtype))
    return [ParameterGroup("first", {"w": first}, 1.0), ParameterGroup("second", {"b": second}, 1.0)]


def loss_sum(groups, rows):
    first, second = (next(iter(group.parameters.values())) for group in groups)
    return (torch.sin(rows) @ first.T + second).square().sum()


def test_micro_batches_add_up_to_the_mean_over_the_whole_count():
    groups, rows = two_groups(), torch.randn(5, 5)
    gradient = StepGradient(groups, launch.accelerator())
    gradient.open(groups)
    for part in rows.split(2):
        gradient.add(loss_sum(groups, part), len(part))
    total = gradient.close(stop=False)
    mean = loss_sum(groups, rows) / 5
    expected = torch.autograd.grad(mean, [next(iter(group.parameters.values())) for group in groups])
    for group, wanted in zip(groups, expected, strict=True):
        (parameter,) = group.parameters.values()
        torch.testing.assert_close(parameter.grad, wanted)
    assert total.loss == pytest.approx(mean.item(), rel=1e-6)
    assert (total.count, total.stop) == (5, False)
    assert total.gradient_norm == pytest.approx(
        torch.cat([g.flatten() for g in expected]).norm().item(), rel=1e-6
    )


@pytest.mark.parametrize("largest", [0.5, 1e6, None])
def test_clipping_is_torchs_over_all_parameters(largest):
    groups, reference = two_groups(), two_groups()
    rows = torch.randn(4, 5)
    gradient = StepGradient(groups, launch.accelerator())
    gradient.open(groups)
    gradient.add(loss_sum(groups, rows), 1)
    gradient.clip(gradient.close(stop=False).gradient_norm, largest)
    loss_sum(reference, rows).backward()
    parameters = [p for group in reference for p in group.parameters.values()]
    nn.utils.clip_grad_norm_(parameters, largest if largest is not None else torch.inf)
    for group, wanted in zip(groups, parameters, strict=True):
        (parameter,) = group.parameters.values()
        # rtol=1e-5: torch adds 1e-6 to the norm that it divides by.
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-5, atol=1e-7)


def step_gradient(scale, loss_of):
    parameter = nn.Parameter(torch.linspace(-1, 1, 7))
    groups = [ParameterGroup("only", {"w": parameter}, 1.0)]
    gradient = StepGradient(groups, launch.accelerator(), scale)
    gradient.open(groups)
    gradient.add(loss_of(parameter), 4)
    gradient.close(stop=False)
    return parameter.grad.clone()


def test_a_loss_scale_changes_no_digit_in_float32():
    def loss_of(parameter):
        return (torch.sin(parameter) * 3).square().sum()

    assert torch.equal(step_gradient(1.0, loss_of), step_gradient(1024.0, loss_of))


def test_a_loss_scale_keeps_gradients_that_float16_would_lose():
    def loss_of(parameter):
        # On its way back the gradient, 1e-8, passes float16, whose smallest number is 6e-8.
        return (parameter.to(torch.float16).float() * 1e-8).sum()

    assert torch.equal(step_gradient(1.0, loss_of), torch.zeros(7))
    # 1e-5 is subnormal in float16: about seven significant bits.
    torch.testing.assert_close(step_gradient(1024.0, loss_of), torch.full((7,), 1e-8 / 4), rtol=1e-2, atol=0)


def test_what_does_not_learn_has_no_gradient_until_it_is_released():
    groups = two_groups()
    (first,), (second,) = (group.parameters.values() for group in groups)
    gradient = StepGradient(groups, launch.accelerator())
    gradient.open(groups)
    gradient.open(groups[1:])
    gradient.add(loss_sum(groups, torch.randn(2, 5)), 2)
    assert first.grad is None
    assert not first.requires_grad
    assert second.grad.abs().sum() > 0
    gradient.release()
    assert first.requires_grad
    assert second.grad is None


def test_a_step_starts_from_zero_and_passes_a_stop_on():
    groups = two_groups()
    gradient = StepGradient(groups, launch.accelerator())
    gradient.open(groups)
    gradient.add(loss_sum(groups, torch.randn(2, 5)), 2)
    assert gradient.close(stop=True).stop
    gradient.open(groups)
    total = gradient.close(stop=False)
    assert (total.loss, total.count, total.gradient_norm, total.stop) == (0.0, 0.0, 0.0, False)


def test_parameters_that_are_not_float32_are_refused():
    with pytest.raises(TrainingError, match=r"first: w is torch.bfloat16 .* must be float32"):
        StepGradient(two_groups(torch.bfloat16), launch.accelerator())
