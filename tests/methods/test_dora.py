import pytest
import torch
from diffusers import StableDiffusionPipeline

from mmpeft.errors import AdapterError, MethodError
from mmpeft.injection import find_targets
from mmpeft.methods.dora import Dora, DoraLayer, DoraSettings
from mmpeft.methods.lora import LoraLayer


@pytest.fixture
def unet(tiny_sd_folder):
    return StableDiffusionPipeline.from_pretrained(tiny_sd_folder).unet


def run(unet):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return unet(
            torch.randn(2, 4, 8, 8, generator=generator), 500, torch.randn(2, 16, 16, generator=generator)
        ).sample


def attached(unet, **settings):
    method = Dora(DoraSettings(**settings))
    method.attach(unet, find_targets("unet", unet, {}, ("*.to_q", "*.conv1", "*.time_emb_proj")))
    return method


def test_a_fresh_adapter_changes_nothing_but_rounding(unet):
    before = run(unet)
    method = attached(unet, rank=4)
    torch.testing.assert_close(run(unet), before, rtol=1e-5, atol=1e-6)  # m / norm is 1 up to one rounding
    assert {name.rsplit(".", 1)[1] for name in method.parameters(unet)} == {
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
    }
    for name, layer in method.layer_adapters(unet).items():
        weight = unet.get_submodule(name).base_layer.weight
        assert layer.dense(weight).abs().max() <= 1e-6 * weight.abs().max()


@pytest.mark.parametrize("settings", [{}, {"alpha": 8.0, "rslora": True}])
def test_the_delta_is_what_the_layer_does(unet, settings):
    method = attached(unet, rank=4, **settings)
    with torch.no_grad():
        for name, parameter in method.parameters(unet).items():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in name else 0.3 * noise)
    expected, layers = run(unet), method.layer_adapters(unet)
    method.detach(unet)
    with torch.no_grad():
        for name, layer in layers.items():
            weight = unet.get_submodule(name).weight
            weight += layer.dense(weight)
    torch.testing.assert_close(run(unet), expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_the_rows_of_the_new_weight_have_the_magnitudes_as_norms():
    generator = torch.Generator().manual_seed(0)
    for kernel in ((), (3, 3)):
        weight = torch.randn(5, 4, *kernel, generator=generator)
        A, B = (
            torch.randn(2, 4, *kernel, generator=generator),
            torch.randn(5, 2, *[1] * len(kernel), generator=generator),
        )
        magnitude = torch.rand(5, generator=generator) + 0.5
        shaped = magnitude.view(1, 5, 1, 1) if kernel else magnitude
        layer = DoraLayer(A, B, 2.0, lora_magnitude_vector=shaped)
        rows = (weight + layer.dense(weight)).flatten(1)
        torch.testing.assert_close(rows.norm(dim=1), magnitude)
        directions = torch.nn.functional.normalize((weight + LoraLayer(A, B, 2.0).dense()).flatten(1))
        torch.testing.assert_close(torch.nn.functional.normalize(rows), directions)


def test_the_delta_needs_the_weight():
    layer = DoraLayer(torch.ones(1, 2), torch.ones(3, 1), 1.0, lora_magnitude_vector=torch.ones(3))
    with pytest.raises(AdapterError, match="depends on the base's weight"):
        layer.delta()
    with pytest.raises(AdapterError, match=r"\(3, 2\); got \(2, 2\)"):
        layer.delta(torch.ones(2, 2))


def test_lora_is_no_start_for_dora(unet):
    method = attached(unet, rank=2)
    layers = {
        n: LoraLayer(layer.lora_A, layer.lora_B, layer.alpha)
        for n, layer in method.layer_adapters(unet).items()
    }
    with pytest.raises(MethodError, match="is lora in the adapter, but dora is to be trained"):
        method.start_from(unet, layers)
