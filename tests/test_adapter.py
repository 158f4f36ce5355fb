import pytest
import torch
from torch import nn

from mmpeft.adapter import Adapter, load_adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.errors import BaseMismatch, ConfigError
from mmpeft.methods.full import FullLayer
from mmpeft.methods.ia3 import Ia3Layer


def test_get_gives_the_default_for_a_layer_that_is_not_there():
    layer = FullLayer(torch.ones(2, 3))
    adapter = Adapter({"unet.conv_in": layer})
    assert adapter.get("unet.conv_in") is layer
    assert adapter.get("unet.conv_out") is None
    assert adapter.get("unet.conv_out", 0) == 0


def test_a_component_that_is_not_there_has_no_layers():
    adapter = Adapter({"unet.conv_in": FullLayer(torch.ones(2, 3))})
    assert list(adapter.component("unet")) == ["conv_in"]
    assert adapter.component("text_encoder") == {}
    assert adapter.components == ("unet",)


def test_a_bound_adapter_knows_its_bases_weights_and_keeps_its_card():
    base = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    layers = {
        "projector.a": Ia3Layer(torch.tensor([2.0, 0.5]), "output"),
        "projector.b": FullLayer(torch.ones(2, 3)),
    }
    adapter = Adapter(layers, AdapterCard(base="tiny"))
    bound = adapter.bound({"projector": base})
    weight = base["a"].weight.detach()
    torch.testing.assert_close(bound["projector.a"].dense(), weight * torch.tensor([[1.0], [-0.5]]))
    assert bound["projector.b"] is layers["projector.b"]
    assert bound.card is adapter.card
    assert bound.digest == adapter.digest


def test_an_adapter_is_not_bound_to_a_base_that_it_does_not_fit():
    ones = FullLayer(torch.ones(2, 3))
    adapter = Adapter({"projector.a": ones, "projector.b": ones, "unet.a": ones}, AdapterCard(base="tiny"))
    base = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 4)})
    with pytest.raises(BaseMismatch) as refusal:
        adapter.bound({"projector": base}, "ink")
    assert str(refusal.value) == (
        "ink was trained on tiny and does not fit this base, projector (ModuleDict): 1 of 3 layers match; "
        "projector.b has weight (4, 3), the adapter's is (2, 3) (projector 1 of 2, unet 0 of 1)"
    )


@pytest.mark.parametrize("path", [None, 3, Adapter({})])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ConfigError, match=f"from the path of a folder or a file; got {type(path).__name__}"):
        load_adapter(path)
