import pytest
import torch

from mmpeft.adapter import Adapter
from mmpeft.methods.full import FullLayer


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_delta_is_the_difference_in_float32(shape, dtype):
    diff = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = FullLayer(diff)
    assert layer.shape == layer.delta().shape == shape
    assert torch.equal(layer.dense(), diff.float())
    assert layer.tensors["diff"] is diff
    assert layer.bound(torch.zeros(shape)) is layer
    assert layer.delta().norm() == pytest.approx(float(diff.double().norm()))


def test_the_digest_sees_the_difference():
    one, other = FullLayer(torch.ones(3)), FullLayer(torch.tensor([1.0, 1.0, 2.0]))
    assert Adapter({"unet.norm": one}).digest == Adapter({"unet.norm": FullLayer(torch.ones(3))}).digest
    assert Adapter({"unet.norm": one}).digest != Adapter({"unet.norm": other}).digest
