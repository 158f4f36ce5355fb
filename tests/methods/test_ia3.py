import pytest
import torch

from mmpeft.delta import Gain
from mmpeft.errors import AdapterError
from mmpeft.methods.ia3 import Ia3Layer

MULTIPLIERS = torch.tensor([1.0, 2.0, 0.0, -1.0])


@pytest.mark.parametrize("is_difference", [False, True])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_each_output_or_input_is_multiplied(kernel, is_difference):
    scaling = (MULTIPLIERS - 1 if is_difference else MULTIPLIERS).reshape(1, 4, *[1] * len(kernel))
    weight = torch.randn(4, 4, *kernel, generator=torch.Generator().manual_seed(0))
    axes = [1] * len(kernel)
    for side, factor in (("output", MULTIPLIERS.view(4, 1, *axes)), ("input", MULTIPLIERS.view(1, 4, *axes))):
        delta = Ia3Layer(scaling, side, is_difference).delta(weight)
        assert isinstance(delta, Gain)
        torch.testing.assert_close(weight + delta.dense(), weight * factor)


def test_a_bias_is_multiplied_too():
    bias = torch.arange(4.0)
    layer = Ia3Layer(MULTIPLIERS.view(4, 1), "output", weight_shape=(4,)).bound(bias)
    torch.testing.assert_close(bias + layer.dense(), bias * MULTIPLIERS)


def test_one_side_of_the_shape_is_not_known_before_the_weight_is():
    outputs, inputs = Ia3Layer(MULTIPLIERS, "output"), Ia3Layer(MULTIPLIERS.view(1, 4, 1, 1), "input")
    assert (outputs.shape, inputs.shape) == ((4, -1), (-1, 4, -1, -1))
    assert outputs.bound(torch.ones(4, 3)).shape == (4, 3)
    with pytest.raises(AdapterError, match=r"\(4, -1\); got \(3, 4\)"):
        outputs.bound(torch.ones(3, 4))
    with pytest.raises(AdapterError, match="depends on the base's weight"):
        outputs.delta()


def test_the_weight_is_kept_by_reference_and_is_no_part_of_the_adapter():
    weight = torch.ones(4, 3)
    layer = Ia3Layer(MULTIPLIERS, "output").bound(weight)
    assert layer.base_weight is weight
    assert layer.tensors.keys() == {"scaling"}
    assert layer.settings == {"is_difference": False, "side": "output"}
    assert "base_weight" not in repr(layer)
    other = torch.full((4, 3), 5.0)
    torch.testing.assert_close(layer.dense(other), 5 * layer.dense())
