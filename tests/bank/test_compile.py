import copy

import pytest
import torch

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.errors import ConfigError
from mmpeft.methods.dora import DoraLayer
from mmpeft.methods.full import FullLayer
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


class Counting:
    """A backend that runs graphs as they are and counts how often it is asked to."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def lora(rank, seed, scale=0.3):
    draw = torch.Generator().manual_seed(seed)
    conv = LoraLayer(
        scale * torch.randn(rank, 2, 3, 3, generator=draw), torch.randn(3, rank, 1, 1, generator=draw), 1.0
    )
    linear = LoraLayer(
        scale * torch.randn(rank, 12, generator=draw), torch.randn(2, rank, generator=draw), 1.0
    )
    return Adapter({"language_model.0": conv, "language_model.3": linear})


@pytest.fixture
def plain():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.GroupNorm(3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("with_gradients", [True, False])
def test_neither_mix_nor_load_within_the_capacity_compiles_again(with_gradients, plain):
    reference = mmpeft.attach(copy.deepcopy(plain))
    bank = mmpeft.attach(plain, capacity=8)
    backend = Counting()
    compiled = torch.compile(plain, backend=backend, fullgraph=True)
    x = torch.randn(5, 2, 4, 4)
    expected = reference._modules["language_model"]
    with torch.set_grad_enabled(with_gradients):
        torch.testing.assert_close(compiled(x), expected(x), **CLOSE)
        first = backend.graphs
        assert first > 0
        for seed, (name, rank) in enumerate((("a", 3), ("b", 1), ("c", 4))):
            for each in (bank, reference):
                each.load(lora(rank, seed), name)
            for mix in ({name: 1.0}, {}, {"a": -0.5, name: 0.3}):
                bank.mix(mix)
                reference.mix(mix)
                torch.testing.assert_close(compiled(x), expected(x), **CLOSE)
        for each in (bank, reference):
            each.unload("a")
            each.load(lora(2, 7), "d")
            each.mix(b=1.0, d=1.0)
        torch.testing.assert_close(compiled(x), expected(x), **CLOSE)
    assert backend.graphs == first


def test_loading_past_the_capacity_compiles_again_and_says_so(plain):
    reference = mmpeft.attach(copy.deepcopy(plain))
    bank = mmpeft.attach(plain, capacity=4)
    backend = Counting()
    compiled = torch.compile(plain, backend=backend, fullgraph=True)
    expected = reference._modules["language_model"]
    x = torch.randn(5, 2, 4, 4)
    bank.load(lora(3, 0), "a")
    with torch.no_grad():
        compiled(x)
        first = backend.graphs
        words = r"b has no room in what was reserved: 2 ranks where 1 are free at language_model\.0; a compiled model"
        with pytest.warns(UserWarning, match=words):
            bank.load(lora(2, 1), "b")
        reference.load(lora(3, 0), "a")
        reference.load(lora(2, 1), "b")
        for mix in ({"a": 0.5, "b": 1.0}, {"b": -1.0}):
            bank.mix(mix)
            reference.mix(mix)
            torch.testing.assert_close(compiled(x), expected(x), **CLOSE)
        second = backend.graphs
        assert second > first
        norm = Adapter({"language_model.1": FullLayer(torch.randn(3)), "language_model.0": dora()})
        with pytest.warns(
            UserWarning, match=r"c has no room in what was reserved: changes that are not low-rank"
        ):
            bank.load(norm, "c")
        reference.load(norm, "c")
        for weight in (1.0, 0.0, -0.3):
            bank.mix(a=1.0, c=weight)
            reference.mix(a=1.0, c=weight)
            torch.testing.assert_close(compiled(x), expected(x), **CLOSE)
            second, third = backend.graphs if weight == 1.0 else second, backend.graphs
        assert third == second  # the new kinds cost one compilation, their weights none


def dora():
    draw = torch.Generator().manual_seed(5)
    A, B = torch.randn(1, 2, 3, 3, generator=draw), torch.randn(3, 1, 1, 1, generator=draw)
    return DoraLayer(A, B, 1.0, lora_magnitude_vector=torch.rand(1, 3, 1, 1, generator=draw))


def test_a_compiled_model_follows_fuse_and_unfuse(plain):
    bank = mmpeft.attach(plain, capacity=4)
    compiled = torch.compile(plain, backend="eager")
    x = torch.randn(5, 2, 4, 4)
    base = compiled(x)
    bank.load(lora(3, 0), "a")
    bank.mix(a=1.0)
    live = compiled(x)
    assert (live - base).norm() > 0.01 * base.norm()
    bank.fuse()
    torch.testing.assert_close(compiled(x), live, **CLOSE)
    bank.unfuse()
    torch.testing.assert_close(compiled(x), live, **CLOSE)
    bank.detach()
    torch.testing.assert_close(compiled(x), base, **CLOSE)


@pytest.mark.parametrize("capacity", [0, -1, 1.5, "8"])
def test_a_capacity_that_is_no_number_of_ranks_is_refused(capacity, plain):
    with pytest.raises(ConfigError, match=r"capacity: must be a whole number of ranks, at least 1; got"):
        mmpeft.attach(plain, capacity=capacity)
