"""Every method with every strategy on every kind of backbone: one composed adapter, the same effect everywhere."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch

import mmpeft
from mmpeft import plugins, randomness
from mmpeft.adapter import Adapter
from mmpeft.delta import Dense
from mmpeft.injection import find_targets, live_layers, vector_layers
from mmpeft.methods.dora import DoraLayer, WeightDecomposedLayer
from mmpeft.methods.full import FullLayer
from mmpeft.methods.glora import GloraLayer
from mmpeft.methods.ia3 import Ia3Layer
from mmpeft.methods.locon import LoconLayer
from mmpeft.methods.loha import LohaLayer
from mmpeft.methods.lokr import LokrLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.methods.oft import OftLayer

SEED = 3
STRATEGIES = plugins.names("strategy")
TRAINED = plugins.names("method")
RANK = 2
# Relative to the result: float32, in the factors on one side and entry by entry on the other; a solver stops when it is
# near (8e-4 at most was seen).
NEAR = {"zip": 2e-3}


# layer adapters of each method, filled with random numbers


def normal(generator, *shape):
    return 0.3 * torch.randn(shape, generator=generator)


def lora(weight, g, rslora=False):
    out, *rest = weight.shape
    ones = [1] * (len(rest) - 1)
    return LoraLayer(normal(g, RANK, *rest), normal(g, out, RANK, *ones), 3.0, rslora)


def rslora(weight, g):
    return lora(weight, g, rslora=True)


def dora(weight, g):
    plain = lora(weight, g)
    norms = weight.flatten(1).norm(dim=1) * (1 + normal(g, len(weight)))
    return DoraLayer(plain.lora_A, plain.lora_B, plain.alpha, lora_magnitude_vector=norms)


def locon(weight, g):
    out, inputs, *kernel = weight.shape
    ones = [1] * len(kernel)
    core = normal(g, RANK, RANK, *kernel) if kernel else None
    return LoconLayer(normal(g, RANK, inputs, *ones), normal(g, out, RANK, *ones), 1.5, core)


def loha(weight, g):
    out, *rest = weight.shape
    inputs = torch.Size(rest).numel()
    halves = [normal(g, out, RANK), normal(g, RANK, inputs), normal(g, out, RANK), normal(g, RANK, inputs)]
    return LohaLayer(*halves, 4.0, weight_shape=tuple(weight.shape))


def weight_decomposed_loha(weight, g):
    scale = weight.transpose(0, 1).flatten(1).norm(dim=1) * (1 + normal(g, weight.shape[1]))
    return WeightDecomposedLayer(loha(weight, g), scale.reshape(1, -1, *[1] * (weight.ndim - 2)), "input")


def lokr(weight, g):
    out, inputs, *kernel = weight.shape
    return LokrLayer(1.0, lokr_w1=normal(g, 2, 2), lokr_w2=normal(g, out // 2, inputs // 2, *kernel))


def glora(weight, g):
    out, inputs, *kernel = weight.shape
    ones = [1] * len(kernel)
    return GloraLayer(
        normal(g, inputs, RANK, *ones),
        normal(g, RANK, inputs, *ones),
        normal(g, out, RANK, *ones),
        normal(g, RANK, inputs, *kernel),
        1.0,
    )


def oft(weight, g):
    return OftLayer(normal(g, len(weight) // 4, 4, 4), weight_shape=tuple(weight.shape))


def ia3(weight, g):
    return Ia3Layer(1 + normal(g, len(weight)), "output", weight_shape=tuple(weight.shape))


def ia3_of_inputs(weight, g):
    return Ia3Layer(1 + normal(g, weight.shape[1]), "input", weight_shape=tuple(weight.shape))


def full(weight, g):
    return FullLayer(normal(g, *weight.shape))


METHODS = {
    each.__name__: each
    for each in (
        lora, rslora, dora, locon, loha, weight_decomposed_loha, lokr, glora, oft, ia3, ia3_of_inputs, full,
    )
}  # fmt: skip
# What changes norms and biases too.
WITH_VECTORS = ("full",)


# backbones


@dataclass
class Backbone:
    """A tiny model: what a bank attaches to, its modules, which layers are changed, and what it computes."""

    model: object
    modules: dict[str, torch.nn.Module]
    layers: tuple[str, ...]
    vectors: tuple[str, ...]
    forward: Callable[[], torch.Tensor]
    made: dict[str, Adapter] = field(default_factory=dict)

    @cached_property
    def weights(self):
        """The base's weights and vectors that adapters change, by layer name."""
        found = {}
        for component, model in self.modules.items():
            places = {disk: (live, "weight") for disk, live in live_layers(component, model).items()}
            places |= vector_layers(component, model)
            for disk, (live, attribute) in places.items():
                found[f"{component}.{disk}"] = getattr(model.get_submodule(live), attribute).detach()
        return found

    def adapter(self, method, seed):
        """Give a random adapter of a method, made once."""
        key = f"{method} {seed}"
        if key not in self.made:
            generator = torch.Generator().manual_seed(seed)
            names = self.layers + (self.vectors if method in WITH_VECTORS else ())
            layers = {name: METHODS[method](self.weights[name], generator) for name in sorted(names)}
            self.made[key] = Adapter(layers)
        return self.made[key]

    @torch.no_grad()
    def output(self):
        return self.forward()


def tiny_unet(folder):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(8).reshape(2, 4) + 3
    return Backbone(
        pipe,
        {"unet": pipe.unet, "text_encoder": pipe.text_encoder},
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
            "unet.mid_block.attentions.0.proj_in",
            "unet.up_blocks.1.resnets.0.conv1",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        ),
        ("unet.up_blocks.1.resnets.0.norm2", "unet.up_blocks.1.resnets.0.conv1.bias"),
        lambda: pipe.unet(latents, 500, pipe.text_encoder(tokens)[0]).sample,
    )


def tiny_transformer(_folder):
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
    ).eval()
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 12, generator=generator)
    pooled = torch.randn(2, 12, generator=generator)
    return Backbone(
        model,
        {"transformer": model},
        (
            "transformer.transformer_blocks.0.attn.to_q",
            "transformer.transformer_blocks.1.ff.net.2",
            "transformer.pos_embed.proj",
        ),
        ("transformer.transformer_blocks.0.attn.to_q.bias",),
        lambda: model(latents, text, pooled, torch.tensor([500.0, 500.0])).sample,
    )


def tiny_llama(_folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.arange(12).reshape(2, 6)
    return Backbone(
        model,
        {"language_model": model},
        (
            "language_model.model.layers.0.self_attn.q_proj",
            "language_model.model.layers.1.mlp.down_proj",
        ),
        ("language_model.model.layers.0.input_layernorm",),
        lambda: model(tokens).logits,
    )


@pytest.fixture(scope="module", params=[tiny_unet, tiny_transformer, tiny_llama], ids=lambda f: f.__name__)
def backbone(request, tiny_sd_folder):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return request.param(tiny_sd_folder)


@pytest.fixture(scope="module")
def attached(backbone):
    bank = mmpeft.attach(backbone.model)
    yield bank
    bank.detach()


@pytest.fixture
def bank(attached):
    """The backbone's bank, empty again after each test."""
    yield attached
    if attached.is_fused:
        attached.unfuse()
    for name in attached.adapters:
        attached.unload(name)


@pytest.fixture(scope="module")
def plain(backbone):
    """What the backbone computes without adapters."""
    return backbone.output()


@pytest.fixture(scope="module")
def digest(attached):
    """The SHA-256 of the backbone's weights as they were."""
    return attached.weights_digest()


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


# compositions


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_composed_adapter_is_the_strategy_on_the_dense_changes_and_does_the_same_live_and_fused(
    backbone, bank, plain, digest, method, strategy, tmp_path
):
    pairs = [(backbone.adapter(method, 1), 0.6), (backbone.adapter("lora", 2), -0.4)]
    needs_base = any(layer.needs_weight for layer in pairs[0][0].values())
    base = backbone.modules if needs_base else None
    merged, report = mmpeft.compose(pairs, strategy, seed=SEED, base=base)
    function = plugins.get("strategy", strategy)
    draws = "generator" in inspect.signature(function).parameters
    for name, layer in merged.items():
        weight = backbone.weights[name]
        terms = [
            (
                Dense(adapter[name].dense(weight) if adapter[name].needs_weight else adapter[name].dense()),
                factor,
            )
            for adapter, factor in pairs
            if name in adapter
        ]
        expected = function(terms, **({"generator": randomness.generator(SEED, name)} if draws else {}))
        assert relative(layer.dense(), expected.dense().reshape(weight.shape)) < NEAR.get(strategy, 1e-4), (
            name
        )
    assert float(report.error) == 0.0
    assert mmpeft.load_adapter(merged.save(tmp_path / "merged")).digest == merged.digest
    bank.load(merged, name="merged")
    bank.mix(merged=0.7)
    live = backbone.output()
    bank.fuse()
    fused = backbone.output()
    bank.unfuse()
    assert relative(live, plain) > 1e-4
    # float32 through every layer of the model
    assert relative(live - plain, fused - plain) < 1e-3
    assert bank.weights_digest() == digest


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_truncated_composition_states_the_error_that_it_has(backbone, strategy, tmp_path):
    pairs = [(backbone.adapter("lora", 1), 0.6), (backbone.adapter("lora", 2), -0.4)]
    whole, _ = mmpeft.compose(pairs, strategy, seed=SEED)
    merged, report = mmpeft.compose(pairs, strategy, seed=SEED, rank=2)
    assert set(report.ranks.values()) <= {1, 2}
    for name in merged:
        lost = relative(merged[name].dense(), whole[name].dense())
        assert lost == pytest.approx(report.error[name], abs=1e-4)
    assert mmpeft.load_adapter(merged.save(tmp_path / "merged")).digest == merged.digest


@pytest.mark.parametrize("method", METHODS)
def test_composed_with_weight_0_any_method_is_nothing(backbone, bank, plain, method):
    merged, _ = mmpeft.compose([(backbone.adapter(method, 1), 0.0)], base=backbone.modules)
    bank.load(merged, name="nothing")
    bank.mix(nothing=1.0)
    assert torch.equal(backbone.output(), plain)


# methods that are trained here


@pytest.mark.parametrize("name", TRAINED)
def test_what_a_trained_method_computes_is_what_its_adapter_does_in_the_bank(backbone, bank, plain, name):
    method_type = plugins.get("method", name)
    chosen = method_type(method_type.settings_type(rank=2, alpha=3.0))
    layers, attached = {}, []
    for component, model in backbone.modules.items():
        disks = [layer.partition(".")[2] for layer in backbone.layers if layer.startswith(component + ".")]
        chosen.attach(model, find_targets(component, model, {}, disks))
        attached.append(model)
    # a fresh adapter changes nothing; DoRA multiplies by a ratio that is 1 but for rounding
    assert relative(backbone.output(), plain) < 1e-5
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for component, model in backbone.modules.items():
            for parameter in chosen.parameters(model).values():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            layers |= {f"{component}.{disk}": layer for disk, layer in chosen.layer_adapters(model).items()}
    trained = backbone.output()
    for model in attached:
        chosen.detach(model)
    assert torch.equal(backbone.output(), plain)
    bank.load(Adapter(layers), name="trained")
    bank.mix(trained=1.0)
    assert relative(backbone.output() - plain, trained - plain) < 1e-3
