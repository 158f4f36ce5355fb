"""Weights that vary in time, place and sample, through the branches of every kind of layer and slot."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DConditionModel
from transformers import LlamaConfig, LlamaForCausalLM

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.batch_layout import BatchLayout
from mmpeft.errors import BankError
from mmpeft.injection import live_layers, vector_layers
from mmpeft.methods.dora import DoraLayer
from mmpeft.methods.full import FullLayer
from mmpeft.methods.ia3 import Ia3Layer
from mmpeft.methods.lora import LoraLayer
from mmpeft.mix import Mask, Schedule, Weight

# float32 sums of some hundred terms, one after another or as one matrix
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LEFT = Mask([[1, 0]])


def normal(generator, *shape):
    return 0.3 * torch.randn(shape, generator=generator)


def lora(weight, generator):
    ones = [1] * (weight.ndim - 2)
    A = normal(generator, 2, *weight.shape[1:])
    return LoraLayer(A, normal(generator, len(weight), 2, *ones), 2.0)


def dora(weight, generator):
    low = lora(weight, generator)
    norms = weight.flatten(1).norm(dim=1) * (1 + normal(generator, len(weight)))
    return DoraLayer(low.lora_A, low.lora_B, 2.0, lora_magnitude_vector=norms)


def ia3(weight, generator):
    return Ia3Layer(normal(generator, weight.shape[1]), "input", True, tuple(weight.shape))


def full(weight, generator):
    return FullLayer(0.3 * normal(generator, *weight.shape))


def adapter_of(make, unet, seed=0, only=""):
    generator = torch.Generator().manual_seed(seed)
    layers = {
        f"unet.{disk}": make(unet.get_submodule(live).weight.detach(), generator)
        for disk, live in live_layers("unet", unet).items()
        if only in disk
    }
    if make is full and not only:
        layers |= {
            f"unet.{disk}": full(getattr(unet.get_submodule(live), part).detach(), generator)
            for disk, (live, part) in vector_layers("unet", unet).items()
        }
    return Adapter(layers)


def predict(unet, rows=slice(None), timestep=500):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 12, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return unet(latents[rows], timestep, text[rows]).sample


@pytest.fixture(params=[lora, dora, ia3, full], ids=lambda make: make.__name__)
def unet_and_bank(request, open_base):
    """With an adapter of one method on every layer, and plain LoRA beside it."""
    unet = open_base().unet
    bank = mmpeft.attach(unet)
    bank.load(adapter_of(request.param, unet), "a")
    bank.load(adapter_of(lora, unet, 1), "b")
    return unet, bank


def test_a_factor_that_is_the_same_throughout_is_a_number(unet_and_bank):
    unet, bank = unet_and_bank
    base = predict(unet)
    bank.mix(a=0.6, b=0.2)
    expected = predict(unet)
    assert (expected - base).norm() > 0.1 * base.norm()
    for same in (
        Weight(0.6, schedule=Schedule(((0.0, 1.0),))),
        Weight(schedule=Schedule(((0.0, 0.0), (499 / 999, 0.6), (1.0, 0.6)))),
        Weight(0.3, samples=(2.0, 2.0)),
        Weight(0.6, conditional_only=True),
    ):
        with bank.using(a=same, b=0.2), bank.batch(BatchLayout(2)):
            torch.testing.assert_close(predict(unet), expected, **CLOSE)
    with bank.using(a=Weight(schedule=Schedule.window(0.6, 1))):
        torch.testing.assert_close(predict(unet), base, **CLOSE)
        assert not torch.allclose(predict(unet, timestep=100), base, **CLOSE)


def test_each_row_of_a_batch_is_that_row_alone(unet_and_bank):
    unet, bank = unet_and_bank
    with bank.using(a=Weight(samples=(0.7, -0.4)), b=Weight(samples=(0.0, 1.0))), bank.batch(BatchLayout(2)):
        together = predict(unet)
    for row, mix in enumerate(({"a": 0.7}, {"a": -0.4, "b": 1.0})):
        with bank.using(mix):
            torch.testing.assert_close(together[row : row + 1], predict(unet, slice(row, row + 1)), **CLOSE)


def test_the_unconditional_rows_are_the_bases(unet_and_bank):
    unet, bank = unet_and_bank
    base = predict(unet)
    bank.mix(a=0.5)
    full_strength = predict(unet)
    with (
        bank.using(a=Weight(0.5, conditional_only=True)),
        bank.batch(BatchLayout(1, guidance="uncond_first")),
    ):
        mixed = predict(unet)
    torch.testing.assert_close(mixed, torch.cat([base[:1], full_strength[1:]]), **CLOSE)


def test_half_a_mask_changes_mostly_its_half_through_every_kind_of_layer(unet_and_bank):
    unet, bank = unet_and_bank
    base = predict(unet)
    for mask, inside in ((LEFT, slice(0, 6)), (Mask(1 - LEFT.area), slice(6, 12))):
        with bank.using(a=Weight(0.3, mask=mask)):
            energy = (predict(unet) - base).square()
        assert energy[..., inside].sum() > 0.7 * energy.sum()


def test_a_mask_over_layers_that_see_text_blends_their_attentions(open_base):
    """Complementary masks on one adapter, twice loaded, are the adapter where its attentions are the last layers."""
    unet = open_base().unet
    bank = mmpeft.attach(unet)
    only = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v"
    for name in ("left", "right"):
        bank.load(adapter_of(lora, unet, only=only), name)
    outputs = []
    attention = unet.get_submodule(only.removesuffix(".to_v"))
    handle = attention.register_forward_hook(lambda module, args, output: outputs.append(output))
    for mix in (
        {"left": 1.0},
        {"left": Weight(mask=LEFT), "right": Weight(mask=Mask(1 - LEFT.area))},
        {"left": Weight(mask=LEFT)},
        {},
    ):
        with bank.using(mix):
            predict(unet)
    handle.remove()
    whole, both, left, base = (output.reshape(2, 8, 12, -1) for output in outputs)
    assert (whole - base).norm() > 0.1 * base.norm()
    torch.testing.assert_close(both, whole, **CLOSE)
    torch.testing.assert_close(left[:, :, :6], whole[:, :, :6], **CLOSE)
    torch.testing.assert_close(left[:, :, 6:], base[:, :, 6:], **CLOSE)


def test_a_mix_that_varies_refuses_to_fuse(unet_and_bank):
    unet, bank = unet_and_bank
    bank.mix(a=Weight(mask=LEFT))
    before = predict(unet)
    with pytest.raises(BankError, match="'a'"):
        bank.fuse()
    assert torch.equal(predict(unet), before)


def test_a_bank_pickles_and_copies_with_what_varies(unet_and_bank):
    unet, bank = unet_and_bank
    bank.mix(a=Weight(mask=LEFT, schedule=Schedule.window(0, 0.9)))
    expected = predict(unet)
    copied = copy.deepcopy(unet)
    bank.mix({})
    torch.testing.assert_close(predict(copied), expected, **CLOSE)


def test_regions_are_run_where_the_weights_are_offloaded(open_base):
    unet = open_base().unet
    bank = mmpeft.attach(unet)
    bank.load(adapter_of(lora, unet), "a")
    bank.mix(a=Weight(mask=LEFT, schedule=Schedule.window(0, 0.9)))
    expected = predict(unet)
    cpu_offload(unet, execution_device=torch.device("cpu"))
    assert unet.conv_in.weight.is_meta
    torch.testing.assert_close(predict(unet), expected, **CLOSE)


@pytest.mark.parametrize("mix", ["a", ["a"], 0.5])
def test_what_is_no_mix_is_refused(mix, unet_and_bank):
    _, bank = unet_and_bank
    bank.mix(a=0.5)
    with pytest.raises(BankError, match="a mix is adapter names with their weights; got"):
        bank.mix(mix)
    assert bank.weights == {"a": 0.5, "b": 0.0}


@pytest.mark.slow
def test_a_compiled_denoiser_needs_no_other_graph_for_other_times_schedules_masks_and_samples():
    graphs, first = [], 0

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(8,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()
    live_unet = copy.deepcopy(unet)
    banks = [mmpeft.attach(unet, capacity=4), mmpeft.attach(live_unet)]
    for bank in banks:
        bank.load(adapter_of(lora, live_unet, 0), "a")
        bank.load(adapter_of(lora, live_unet, 1), "b")
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend=count)
    try:
        for points, mask, samples in (
            (((0.0, 1.0),), LEFT, (1.0, 0.5)),
            (((0.0, 1.0), (0.3, 0.0), (0.6, 1.0)), Mask([[1.0, 0.3]]), (-1.0, 0.0)),
        ):
            mix = {
                "a": Weight(schedule=Schedule(points), mask=mask, samples=samples),
                "b": Weight(conditional_only=True),
            }
            for timestep in (900, 500, 20):
                found = []
                for bank, model in zip(banks, (compiled, live_unet), strict=True):
                    with bank.using(mix), bank.batch(BatchLayout(2)):
                        found.append(predict(model, timestep=torch.tensor(timestep)))
                torch.testing.assert_close(*found, **CLOSE)
                first = first or len(graphs)
    finally:
        torch._dynamo.reset()
    assert len(graphs) == first


# language models: rows are prompts, or prompts times beams


@pytest.fixture(scope="module")
def llama_and_bank():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
            initializer_range=0.5,
        )
        llama = LlamaForCausalLM(config).eval()
    bank = mmpeft.attach(llama)
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        layers = {
            f"language_model.{disk}": lora(llama.get_submodule(live).weight.detach(), generator)
            for disk, live in live_layers("language_model", llama).items()
        }
        bank.load(Adapter(layers), name)
    return llama, bank


def generate(llama, tokens, **settings):
    with torch.no_grad():
        return llama.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )


@pytest.mark.parametrize(("beams", "returned"), [(1, 1), (3, 1), (3, 2)])
def test_generation_with_weights_per_prompt_equals_each_prompt_alone(beams, returned, llama_and_bank):
    llama, bank = llama_and_bank
    tokens = torch.tensor([[1, 5, 9, 12], [1, 30, 2, 7], [1, 8, 8, 21]])
    settings = {"num_beams": beams, "num_return_sequences": returned}
    mixes = [{"a": 0.9}, {}, {"a": -0.5, "b": 0.7}]
    weights = {"a": Weight(samples=(0.9, 0.0, -0.5)), "b": Weight(samples=(0.0, 0.0, 0.7))}
    with bank.using(weights), bank.batch(BatchLayout(3, per_prompt=beams)):
        together = generate(llama, tokens, **settings)
    base = generate(llama, tokens, **settings)
    assert not torch.equal(together.sequences, base.sequences)
    for row, mix in enumerate(mixes):
        with bank.using(mix):
            alone = generate(llama, tokens[row : row + 1], **settings)
        rows = slice(row * returned, (row + 1) * returned)
        assert torch.equal(together.sequences[rows], alone.sequences)
        for scores, own in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(scores[row * beams : (row + 1) * beams], own, rtol=1e-4, atol=1e-4)


def test_generation_in_a_batch_that_was_not_declared_is_refused(llama_and_bank):
    llama, bank = llama_and_bank
    tokens = torch.tensor([[1, 5, 9, 12], [1, 30, 2, 7]])
    with bank.using(a=Weight(samples=(1.0, 0.0))):
        with pytest.raises(BankError, match=r"declare it with bank\.batch"):
            generate(llama, tokens)
        with bank.batch(BatchLayout(2)), pytest.raises(BankError, match="a batch of 6, and the layout"):
            generate(llama, tokens, num_beams=3)
