"""One layer at a time: what the branch adds equals what the changed weight computes, whatever the kind of change."""

import copy

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.errors import BankError
from mmpeft.methods.dora import DoraLayer
from mmpeft.methods.full import FullLayer
from mmpeft.methods.ia3 import Ia3Layer
from mmpeft.methods.lora import LoraLayer

# float32 sums of some hundred terms, added before or after the product
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "without bias": lambda: nn.Linear(6, 5, bias=False),
    "conv": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1),
    "pointwise": lambda: nn.Conv2d(6, 5, 1, padding_mode="circular"),
}


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def kinds(weight):
    """One layer adapter of each kind for a weight."""
    out, inputs, *kernel = weight.shape
    A, B = draw(2, inputs, *kernel), draw(out, 2, *[1] * len(kernel))
    magnitude = torch.rand(1, out, *[1] * len(kernel), generator=torch.Generator().manual_seed(0)) + 0.5
    return {
        "lora": LoraLayer(A, B, 3.0),
        "dora": DoraLayer(A, B, 3.0, lora_magnitude_vector=magnitude if kernel else magnitude[0]),
        "outputs": Ia3Layer(draw(out), "output", weight_shape=tuple(weight.shape)),
        "inputs": Ia3Layer(draw(inputs), "input", weight_shape=tuple(weight.shape)),
        "full": FullLayer(draw(*weight.shape)),
    }


def input_for(layer, batch=3):
    return draw(batch, 6, 8, 8) if isinstance(layer, nn.Conv2d) else draw(batch, 7, 6)


def changed(layer, adapters, weights):
    """The layer with its weight changed by hand, to be called by `forward`, which no hook sees."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for kind, factor in weights.items():
            twin.weight += factor * adapters[kind].dense(layer.weight).reshape(layer.weight.shape)
    return twin


def with_bank(layer, adapters, **settings):
    model = nn.Sequential(layer)
    bank = mmpeft.attach(model, **settings)
    for kind, layer_adapter in adapters.items():
        bank.load(Adapter({"language_model.0": layer_adapter}), kind)
    return bank, model


MIXES = [
    {"lora": 0.7},
    {"dora": 1.0},
    {"outputs": -0.5},
    {"inputs": 0.8},
    {"full": 0.3},
    {"lora": 1.0, "dora": 0.4, "outputs": 0.5, "inputs": -1.2, "full": 0.1},
]


@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:.*has no room in what was reserved")
def test_every_kind_of_change_mixes_live(kind, with_gradients, capacity):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    adapters = kinds(layer.weight)
    bank, model = with_bank(layer, adapters, capacity=capacity)
    # the branch where gradients are wanted, else the changed weight
    for x in (input_for(layer), input_for(layer, batch=300)):
        for mix in MIXES:
            bank.mix(mix)
            expected = changed(layer, adapters, mix).forward(x)
            with torch.set_grad_enabled(with_gradients):
                torch.testing.assert_close(model(x), expected, **CLOSE)
        bank.mix()
        torch.testing.assert_close(model(x), layer.forward(x), **CLOSE)


@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.filterwarnings("ignore:.*has no room in what was reserved")
def test_large_layers_compute_the_same_by_the_branch_and_by_the_changed_weight(kind, capacity):
    torch.manual_seed(0)
    layer = nn.Linear(300, 260) if kind == "linear" else nn.Conv2d(100, 90, 3)
    adapters = kinds(layer.weight)
    bank, model = with_bank(layer, adapters, capacity=capacity)
    few, many = (
        (draw(3, 300), draw(6000, 300)) if kind == "linear" else (draw(1, 100, 4, 4), draw(3, 100, 30, 30))
    )
    branch = bank._branches["language_model.0"]
    with torch.no_grad():
        for x, is_changed in ((few, False), (many, True)):
            bank.mix(lora=1.0)
            assert (branch.before(layer, (x,), {}) is not None) == is_changed
            branch._held.clear()
            for mix in MIXES:
                bank.mix(mix)
                # sums of some thousand terms of size 10
                expected = changed(layer, adapters, mix).forward(x)
                assert (model(x) - expected).norm() < 1e-5 * expected.norm()


def test_the_branch_follows_changes_of_the_base():
    layer = nn.Linear(6, 5)
    adapters = kinds(layer.weight)
    bank, model = with_bank(layer, {"lora": adapters["lora"]})
    bank.mix(lora=1.0)
    x = input_for(layer)
    with torch.no_grad():
        before = model(x)
        layer.weight.data += 1e-3  # which leaves no trace in the parameter
        expected = before + 1e-3 * x.sum(-1, keepdim=True)
        torch.testing.assert_close(model(x), expected, **CLOSE)
        layer.weight[0, 0] -= 0.1
        expected[..., 0] -= 0.1 * x[..., 0]
        torch.testing.assert_close(model(x), expected, **CLOSE)
        layer.bias += 1
        torch.testing.assert_close(model(x), expected + 1, **CLOSE)


def test_gradients_flow_through_the_branch_as_through_the_changed_weight():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    adapters = kinds(layer.weight)
    bank, model = with_bank(layer, adapters)
    mix = {"lora": 0.5, "dora": 1.0, "inputs": 0.5}
    bank.mix(mix)
    x, y = (input_for(layer).requires_grad_() for _ in range(2))
    model(x).square().sum().backward()
    changed(layer, adapters, mix).forward(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, **CLOSE)


@pytest.mark.parametrize("kind", LAYERS)
def test_biases_and_weights_change_together(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    if layer.bias is None:
        model = nn.Sequential(layer)
        with pytest.raises(mmpeft.errors.BaseMismatch, match=r"there is no language_model\.0\.bias"):
            mmpeft.attach(model).load(Adapter({"language_model.0.bias": FullLayer(draw(5))}), "a")
        return
    adapters = kinds(layer.weight)
    model = nn.Sequential(layer)
    bank = mmpeft.attach(model)
    both = {"language_model.0": adapters["dora"], "language_model.0.bias": FullLayer(draw(5))}
    bank.load(Adapter(both), "a")
    bank.mix(a=0.6)
    expected = changed(layer, adapters, {"dora": 0.6})
    with torch.no_grad():
        expected.bias += 0.6 * draw(5)
        for x in (input_for(layer), input_for(layer, batch=300)):
            torch.testing.assert_close(model(x), expected.forward(x), **CLOSE)
    bank.fuse()
    torch.testing.assert_close(layer.bias, expected.bias, **CLOSE)
    torch.testing.assert_close(model(x), expected.forward(x), **CLOSE)


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))
        self.variance_epsilon = 1e-5

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


NORMS = {
    "group": (lambda: nn.GroupNorm(3, 6), (2, 6, 4, 4)),
    "group of tokens": (lambda: nn.GroupNorm(2, 6), (2, 6, 9)),
    "layer": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "rms": (lambda: nn.RMSNorm(6), (2, 5, 6)),
    "llama": (LlamaRMSNorm, (2, 5, 6)),
}


@pytest.mark.parametrize("kind", NORMS)
def test_gains_and_biases_of_norms_mix_live(kind):
    make, shape = NORMS[kind]
    torch.manual_seed(0)
    norm, x = make(), 1 + draw(*shape)
    with torch.no_grad():
        norm.weight.normal_()
    changes = {"language_model.0": ("weight", draw(6))}
    if getattr(norm, "bias", None) is not None:
        changes["language_model.0.bias"] = ("bias", -draw(6))
    expected = copy.deepcopy(norm)
    with torch.no_grad():
        for part, change in changes.values():
            getattr(expected, part).add_(0.7 * change)
    model = nn.Sequential(norm)
    bank = mmpeft.attach(model)
    bank.load(Adapter({name: FullLayer(change) for name, (_, change) in changes.items()}), "a")
    before = bank.weights_digest()
    bank.mix(a=0.7)
    torch.testing.assert_close(model(x), expected(x), **CLOSE)
    bank.fuse()
    torch.testing.assert_close(model(x), expected(x), **CLOSE)
    bank.unfuse()
    assert bank.weights_digest() == before


def test_a_grouped_convolutions_bias_mixes_live():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=3))
    bank = mmpeft.attach(model, capacity=4)
    x = draw(2, 6, 8, 8)
    expected = model(x) + 0.5 * draw(6)[:, None, None]
    with pytest.warns(
        UserWarning, match=r"a has no room in what was reserved: changes that are not low-rank"
    ):
        bank.load(Adapter({"language_model.0.bias": FullLayer(draw(6))}), "a")
    bank.mix(a=0.5)
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_a_bias_that_no_call_uses_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    bank = mmpeft.attach(model)
    with pytest.raises(
        BankError, match=r"changes language_model\.attention\.out_proj\.bias, whose kind of layer"
    ):
        bank.load(Adapter({"language_model.attention.out_proj.bias": FullLayer(draw(4))}), "a")
    assert not bank.adapters


@pytest.mark.parametrize("kind", ["conv", "pointwise"])
def test_memory_formats_are_kept(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(memory_format=torch.channels_last)
    adapters = kinds(layer.weight)
    bank, model = with_bank(layer, {"lora": adapters["lora"]})
    bank.mix(lora=1.0)
    for batch in (1, 300):
        x = input_for(layer, batch).to(memory_format=torch.channels_last)
        with torch.no_grad():
            output = model(x)
            torch.testing.assert_close(output, changed(layer, adapters, {"lora": 1.0}).forward(x), **CLOSE)
        assert output.stride() == layer.forward(x).stride()


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_computes_the_branch_in_its_type(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    adapters = kinds(layer.weight)
    bank, model = with_bank(layer, adapters)
    mix = {"lora": 0.5, "outputs": 0.3, "inputs": 0.2}
    bank.mix(mix)
    x = input_for(layer)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    expected = changed(layer, adapters, mix).forward(x)
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() < 0.02 * expected.norm()  # bfloat16 keeps 8 bits


def test_half_precision_keeps_a_change_that_rounding_into_the_weight_would_lose():
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(layer.weight)  # the next number of bfloat16 is 1.0078
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    change = LoraLayer(signs[None], torch.ones(64, 1), 1e-3)
    bank, model = with_bank(layer, {"a": change})
    x = signs.bfloat16().expand(5000, -1)
    bank.mix(a=1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(x).float(), torch.full((5000, 64), 0.064), rtol=0.01, atol=0)
        report = bank.fuse()
        assert not model(x).any()
    assert report.lost == pytest.approx(1.0, rel=1e-4)


def test_other_hooks_on_the_layer_see_what_they_saw_before():
    layer = nn.Linear(6, 5)
    adapters = kinds(layer.weight)
    model = nn.Sequential(layer)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0].shape, output)))
    bank = mmpeft.attach(model)
    bank.load(Adapter({"language_model.0": adapters["lora"]}), "a")
    bank.mix(a=1.0)
    x = input_for(layer, batch=300)
    with torch.no_grad():
        model(x)
        shape, output = seen[0]
        assert shape == x.shape
        assert torch.equal(output, layer.forward(x))


def test_inputs_may_be_given_by_name():
    layer = nn.Linear(6, 5)
    adapters = kinds(layer.weight)
    bank, _ = with_bank(layer, {"lora": adapters["lora"]})
    bank.mix(lora=1.0)
    x = input_for(layer)
    torch.testing.assert_close(layer(input=x), changed(layer, adapters, {"lora": 1.0}).forward(x), **CLOSE)


def test_an_adapter_with_weight_0_costs_no_pass_and_changes_nothing():
    layer = nn.Linear(6, 5)
    adapters = kinds(layer.weight)
    bank, model = with_bank(layer, adapters)
    bank.mix(lora=0.5)
    x = input_for(layer)
    torch.testing.assert_close(model(x), changed(layer, adapters, {"lora": 0.5}).forward(x), **CLOSE)
    bank.mix(lora=0.0)
    assert torch.equal(model(x), layer.forward(x))


def test_what_a_failed_call_was_given_is_not_computed_by_the_next():
    layer = nn.Linear(64, 64)
    bank = mmpeft.attach(nn.Sequential(layer))
    bank.load(Adapter({"language_model.0": LoraLayer(draw(2, 64), draw(64, 2), 2.0)}), "a")
    bank.mix(a=1.0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(draw(5, 63))
    x = draw(2, 64)
    with_gradients = layer(x)
    assert with_gradients.shape == (2, 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), with_gradients.detach(), **CLOSE)


def test_the_kept_changed_weight_follows_a_change_that_keeps_the_sum():
    layer = nn.Linear(64, 64)
    bank = mmpeft.attach(nn.Sequential(layer))
    adapter = LoraLayer(draw(2, 64), draw(64, 2), 2.0)
    bank.load(Adapter({"language_model.0": adapter}), "a")
    bank.mix(a=1.0)
    x = draw(3, 64)
    with torch.no_grad():
        layer(x)
        for seed in range(20):
            order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
            layer.weight.copy_(layer.weight[order])
            expected = nn.functional.linear(x, layer.weight + adapter.dense(), layer.bias)
            torch.testing.assert_close(
                layer(x), expected, rtol=1e-4, atol=1e-4
            )  # sums of 64 terms of size 10


def test_a_detached_bank_says_that_it_is():
    bank = mmpeft.attach(nn.Sequential(nn.Linear(6, 5)))
    assert bank.is_attached
    bank.detach()
    assert not bank.is_attached
    with pytest.raises(BankError, match="this bank was detached; attach a new one"):
        bank.load(Adapter({"language_model.0": LoraLayer(draw(2, 6), draw(5, 2), 2.0)}), "a")
