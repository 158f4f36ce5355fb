import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline

from mmpeft.config import Recipe
from mmpeft.errors import ConfigError, MethodError
from mmpeft.injection import find_targets
from mmpeft.methods.lora import Lora, LoraLayer, LoraSettings

TARGETS = ("*.attn?.to_q", "*.conv1")


@pytest.fixture
def unet(tiny_sd_folder):
    return StableDiffusionPipeline.from_pretrained(tiny_sd_folder).unet


def attached(unet, **settings):
    torch.manual_seed(0)
    method = Lora(LoraSettings(**settings))
    method.attach(unet, find_targets("unet", unet, {}, TARGETS))
    return method


def randomise(method, unet):
    with torch.no_grad():
        for parameter in method.parameters(unet).values():
            parameter.normal_(0, 0.3)


def run(unet):
    generator = torch.Generator().manual_seed(3)
    weight = unet.conv_in.weight
    noisy = torch.randn(2, 4, 8, 8, generator=generator).to(weight)
    with torch.no_grad():
        return unet(noisy, 500, torch.randn(2, 16, 16, generator=generator).to(weight)).sample


def test_a_fresh_adapter_changes_nothing(unet):
    before = run(unet)
    attached(unet)
    assert torch.equal(run(unet), before)


def test_only_its_own_float32_parameters_learn(unet):
    unet.to(torch.bfloat16)
    method = attached(unet, rank=2)
    parameters = method.parameters(unet)
    assert list(parameters) == list(method.parameters(unet))
    assert {name.rsplit(".", 1)[1] for name in parameters} == {"lora_A", "lora_B"}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters.values())
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in parameters.values()}


@pytest.mark.parametrize(
    "settings", [{}, {"alpha": 8.0}, {"rslora": True, "alpha": 6.0}, {"rank_pattern": {"*.conv1": 3}}]
)
def test_the_delta_is_what_the_layer_does(unet, settings):
    method = attached(unet, rank=4, **settings)
    randomise(method, unet)
    expected = run(unet)
    layers = method.layer_adapters(unet)
    method.detach(unet)
    with torch.no_grad():
        for name, layer in layers.items():
            weight = unet.get_submodule(name).weight
            weight += layer.dense()
    # float32 sums of at most 144 terms, added before or after the product
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-5)


def test_ranks_and_alphas_follow_their_patterns(unet):
    method = attached(unet, rank=4, rank_pattern={"*.conv1": 3, "*": 5}, alpha_pattern={"*attn1.to_q": 7.0})
    layers = method.layer_adapters(unet)
    conv = next(layer for name, layer in layers.items() if name.endswith("conv1"))
    first = next(layer for name, layer in layers.items() if name.endswith("attn1.to_q"))
    second = next(layer for name, layer in layers.items() if name.endswith("attn2.to_q"))
    assert (conv.rank, conv.alpha) == (3, 3.0)
    assert (first.rank, first.alpha) == (5, 7.0)
    assert (second.rank, second.alpha) == (5, 5.0)
    assert conv.lora_A.shape[1:] == unet.down_blocks[0].resnets[0].conv1.weight.shape[1:]
    assert method.unused_patterns == frozenset()


def test_patterns_that_name_no_layer_are_told(unet):
    method = attached(unet, rank_pattern={"*.to_v": 3})
    assert method.unused_patterns == {"*.to_v"}


def test_patterns_survive_a_recipes_dotted_keys():
    recipe = Recipe.build({"out": "x", "method.rank_pattern": {"mid_block.*.to_q": 4}})
    assert recipe.method.rank_pattern == {"mid_block.*.to_q": 4}
    with pytest.raises(ConfigError, match=r"method.rank_pattern.*above 0"):
        Recipe.build({"out": "x", "method.rank_pattern": {"a": 0}})


def test_scale_is_alpha_over_rank_or_its_root():
    A, B = torch.ones(4, 2), torch.ones(3, 4)
    assert LoraLayer(A, B, 8.0).scale == 2.0
    assert LoraLayer(A, B, 8.0, rslora=True).scale == 4.0
    assert torch.equal(LoraLayer(A, B, 8.0, rslora=True).dense(), torch.full((3, 2), 16.0))


def test_it_learns(unet):
    method = attached(unet, rank=2, dropout=0.1)
    optimizer = torch.optim.Adam(method.parameters(unet).values(), lr=0.05)
    noisy, text, goal = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16), torch.zeros(2, 4, 8, 8)
    losses = []
    for _ in range(20):
        loss = (unet(noisy, 500, text).sample - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_switched_off_computes_as_the_base_and_changes_nothing_else(unet):
    before = run(unet)
    method = attached(unet)
    randomise(method, unet)
    with_adapter = run(unet)
    first = next(iter(method.parameters(unet).values()))
    first.requires_grad_(False)
    with method.switched_off(unet):
        assert torch.equal(run(unet), before)
    assert torch.equal(run(unet), with_adapter)
    assert [p.requires_grad for p in method.parameters(unet).values()].count(False) == 1


def test_detach_leaves_the_model_as_it_was_found(unet):
    names = [name for name, _ in unet.named_modules()]
    state = copy.deepcopy(unet.state_dict())
    learns = {name: p.requires_grad for name, p in unet.named_parameters()}
    method = attached(unet)
    randomise(method, unet)
    method.detach(unet)
    assert [name for name, _ in unet.named_modules()] == names
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in state.items())
    assert {name: p.requires_grad for name, p in unet.named_parameters()} == learns
    assert not hasattr(unet, "peft_config")
    attached(unet)  # and it can be attached again


def test_training_goes_on_from_an_adapter_with_the_same_effect(unet):
    method = attached(unet, rank=4, alpha=2.0)
    randomise(method, unet)
    expected, layers = run(unet), method.layer_adapters(unet)
    method.detach(unet)
    again = attached(unet, rank=4, rslora=True)
    again.start_from(unet, layers)
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-5)  # B rescaled: one rounding more
    same = attached(copy_of := copy.deepcopy(_detached(again, unet)), rank=4, alpha=2.0)
    same.start_from(copy_of, layers)
    assert all(
        torch.equal(tensor, layers[name].tensors[part])
        for name, layer in same.layer_adapters(copy_of).items()
        for part, tensor in layer.tensors.items()
    )


def _detached(method, unet):
    method.detach(unet)
    return unet


def test_an_adapter_of_other_ranks_layers_or_method_cannot_be_gone_on_from(unet):
    method = attached(unet, rank=4)
    layers = method.layer_adapters(unet)
    first = next(iter(layers))
    with pytest.raises(MethodError, match=rf"the adapter lacks '{first}'"):
        method.start_from(unet, {name: layer for name, layer in layers.items() if name != first})
    with pytest.raises(MethodError, match="the method does not train 'x'"):
        method.start_from(unet, {**layers, "x": layers[first]})
    method.detach(unet)
    other = attached(unet, rank=2)
    with pytest.raises(MethodError, match=r"rank 4.*set method.rank"):
        other.start_from(unet, layers)


def test_a_model_that_carries_adapters_is_refused(unet):
    attached(unet)
    with pytest.raises(MethodError, match="carries adapters of PEFT or diffusers already"):
        attached(unet)


def test_layers_that_cannot_be_adapted_are_refused(unet):
    with pytest.raises(MethodError, match=r"cannot adapt down_blocks.0.resnets.0.norm1 \(GroupNorm\)"):
        Lora(LoraSettings()).attach(unet, {"down_blocks.0.resnets.0.norm1": "x"})
    with pytest.raises(MethodError, match="no layer"):
        Lora(LoraSettings()).attach(unet, {})
    with pytest.raises(MethodError, match="not attached"):
        Lora(LoraSettings()).parameters(unet)


def test_names_with_a_common_end_are_kept_apart():
    # PEFT matches listed names by their ends
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(2, 2), "b": torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})}
    )
    method = Lora(LoraSettings(rank=1))
    method.attach(model, {"a": "a"})
    assert list(method.parameters(model)) == ["a.lora_A", "a.lora_B"]
    assert isinstance(model["b"]["a"], torch.nn.Linear)
    assert type(model["b"]["a"]) is torch.nn.Linear
