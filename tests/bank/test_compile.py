import copy

import pytest
import torch

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.methods.dora import DoraLayer
from mmpeft.methods.lora import LoraLayer

# of torch's own compiler
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
# float32 sums of some hundred terms, added before or after the product
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("order", ["attach, compile", "compile, attach"])
def test_a_compiled_model_follows_the_mix(order):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    )
    conv = LoraLayer(torch.randn(2, 2, 3, 3), torch.randn(3, 2, 1, 1), 1.0)
    linear = DoraLayer(torch.randn(1, 12), torch.randn(2, 1), 1.0, lora_magnitude_vector=torch.rand(2))
    x = torch.randn(5, 2, 4, 4)
    model = copy.deepcopy(plain)
    if order == "attach, compile":
        bank = mmpeft.attach(model)
        model = torch.compile(model, backend="eager")
        model(x)
    else:
        model = torch.compile(model, backend="eager")
        model(x)
        with pytest.warns(
            UserWarning, match=r"was compiled before the bank came: it compiles again; attach first"
        ):
            bank = mmpeft.attach(model)
    reference = mmpeft.attach(plain)
    for one in (bank, reference):
        one.load(Adapter({"language_model.0": conv}), "a")
        one.load(Adapter({"language_model.3": linear}), "b")
    for weights in ({"a": 1.0}, {"a": -0.5}, {}, {"a": 0.2, "b": 1.0}):
        bank.mix(weights)
        reference.mix(weights)
        torch.testing.assert_close(model(x), plain(x), **CLOSE)
    bank.fuse()
    torch.testing.assert_close(model(x), plain(x), **CLOSE)
    torch._dynamo.reset()
