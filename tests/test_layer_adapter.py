import pytest
import torch

from mmpeft.layer_adapter import by_component, shapes_agree
from mmpeft.methods.full import FullLayer


@pytest.mark.parametrize(
    ("ours", "weight"),
    [
        ((4, 3), (4, 3)),
        ((4, 27), (4, 3, 3, 3)),
        ((4, 3), (4, 3, 1, 1)),
        ((4, 3, 1, 1), (4, 3)),
        ((4, -1), (4, 3, 3, 3)),
        ((-1, 3), (4, 3)),
        ((-1, 3, 1, 1), (4, 3)),
        ((4, -1, 3, 3), (4, 3, 3, 3)),
        ((-1, 3, -1, -1), (4, 3, 3, 3)),
        ((-1, 3, -1, -1), (4, 3)),
        ((4,), (4,)),
    ],
)
def test_a_layer_adapters_shape_may_say_less_than_the_weights(ours, weight):
    assert shapes_agree(ours, weight)


@pytest.mark.parametrize(
    ("ours", "weight"),
    [
        ((4, 3), (3, 4)),
        ((4, 3), (4, 3, 3, 3)),
        ((4, 3, 3, 3), (4, 27)),
        ((5, -1), (4, 3, 3, 3)),
        ((-1, 3), (4, 3, 3, 3)),
        ((-1, 2, -1, -1), (4, 3)),
        ((4, 3, 1, 1), (4, 3, 3, 3)),
        ((4,), (4, 1)),
        ((4, 1), (4,)),
    ],
)
def test_other_shapes_do_not_agree(ours, weight):
    assert not shapes_agree(ours, weight)


def test_layers_are_sorted_by_component_and_lose_its_name():
    layer = FullLayer(torch.ones(2, 3))
    names = ["unet.conv_out", "text_encoder.a.b", "unet.conv_in", "text_encoder_2.a.b"]
    found = by_component(dict.fromkeys(names, layer))
    assert {component: list(layers) for component, layers in found.items()} == {
        "text_encoder": ["a.b"],
        "text_encoder_2": ["a.b"],
        "unet": ["conv_out", "conv_in"],
    }
    assert list(found) == ["text_encoder", "text_encoder_2", "unet"]
    assert by_component({}) == {}
