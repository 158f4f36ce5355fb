import json
import sys

import pytest
import torch
from torch import nn

from mmpeft.config import TrainSettings
from mmpeft.errors import ConfigError, MissingDependency, TrainingError
from mmpeft.trainers import optimizers
from mmpeft.trainers.task import ParameterGroup

KINDS = ["adamw", "adafactor", "prodigy", "adamw8bit"]


def groups(learning_rates=(0.5, 0.5)):
    torch.manual_seed(0)
    # 80 x 80: large enough for the 8-bit state of bitsandbytes, which keeps small tensors in 32 bits.
    first, second = nn.Parameter(torch.randn(80, 80)), nn.Parameter(torch.randn(5))
    return [
        ParameterGroup("unet", {"a": first}, learning_rates[0]),
        ParameterGroup("text_encoder", {"b": second}, learning_rates[1]),
    ]


def take_steps(optimizer, made, numbers):
    for number in numbers:
        for group in made:
            for parameter in group.parameters.values():
                parameter.grad = torch.sin(parameter.detach() + number)
        optimizer.step()


def build(kind, made):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    return optimizers.build(TrainSettings(optimizer=kind, learning_rate=0.5), made)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_restored_from_tensors_and_json_goes_on_bit_for_bit(kind):
    names = ["unet.a", "text_encoder.b"]
    made = groups()
    optimizer = build(kind, made)
    take_steps(optimizer, made, range(4))
    tensors, rest = optimizers.state_of(optimizer, names)
    kept = {group.name: {n: p.detach().clone() for n, p in group.parameters.items()} for group in made}
    take_steps(optimizer, made, range(4, 8))

    again = groups()
    fresh = build(kind, again)
    for group in again:
        for name, parameter in group.parameters.items():
            parameter.data.copy_(kept[group.name][name])
    optimizers.restore(fresh, names, tensors, json.loads(json.dumps(rest, allow_nan=False)))
    take_steps(fresh, again, range(4, 8))
    for one, other in zip(made, again, strict=True):
        for name in one.parameters:
            assert torch.equal(one.parameters[name], other.parameters[name])
    assert not torch.equal(kept["unet"]["a"], again[0].parameters["a"])


def test_prodigys_estimate_of_the_rate_is_part_of_the_state():
    made = groups()
    optimizer = build("prodigy", made)
    for _ in range(40):
        for group in made:
            for parameter in group.parameters.values():
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    _, rest = optimizers.state_of(optimizer, ["a", "b"])
    assert rest["groups"][0]["d"] > 1e-6  # it starts at 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_a_gradient_is_not_touched(kind):
    made = groups()
    optimizer = build(kind, made)
    take_steps(optimizer, made, range(3))
    before = made[1].parameters["b"].detach().clone()
    made[1].parameters["b"].grad = None
    optimizer.param_groups[1]["lr"] = 0.0
    made[0].parameters["a"].grad = torch.ones(80, 80)
    optimizer.step()
    assert torch.equal(made[1].parameters["b"], before)


def test_prodigy_refuses_two_learning_rates():
    with pytest.raises(ConfigError, match=r"prodigy finds one learning rate.*\[0\.1, 0\.5\]"):
        build("prodigy", groups((0.5, 0.1)))


def test_prodigy_does_not_print(capsys):
    build("prodigy", groups())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("kind", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_library_says_how_to_get_it(kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(MissingDependency, match=rf"needs {package}.*pip install 'mmpeft\[{kind}\]'"):
        optimizers.build(TrainSettings(optimizer=kind), groups())


def test_a_state_of_other_parameters_is_refused():
    made = groups()
    optimizer = build("adamw", made)
    take_steps(optimizer, made, range(1))
    tensors, rest = optimizers.state_of(optimizer, ["a", "b"])
    with pytest.raises(TrainingError, match="optimiser state for 'b'"):
        optimizers.restore(optimizer, ["a", "c"], tensors, rest)


def test_a_group_learns_for_its_share_of_the_steps():
    group = ParameterGroup("text_encoder", {}, 1e-4, stop_after=0.3)
    assert [step for step in range(10) if group.learns_at(step, 10)] == [0, 1, 2]
    assert group.learns_at(0, 1)
