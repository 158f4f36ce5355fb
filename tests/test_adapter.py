import pytest
import torch

from mmpeft.adapter import Adapter, shapes_agree
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


def test_get_gives_the_default_for_a_layer_that_is_not_there():
    layer = FullLayer(torch.ones(2, 3))
    adapter = Adapter({"unet.conv_in": layer})
    assert adapter.get("unet.conv_in") is layer
    assert adapter.get("unet.conv_out") is None
    assert adapter.get("unet.conv_out", 0) == 0
