import pickle
from contextlib import nullcontext

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from mmpeft.batch_layout import BatchLayout
from mmpeft.errors import BankError
from mmpeft.injection import live_layers
from mmpeft.live.conditions import Conditions
from mmpeft.mix import Mask, Mix, Schedule, Weight

RIGHT = torch.tensor([[0.0, 1.0]])
TIME_OF_STEP = torch.linspace(1, 0, 1000)


@pytest.fixture(scope="module")
def unet():
    """Latents of 8 x 12 are halved twice; text is 5 tokens long."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            block_out_channels=(8, 8, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()


@pytest.fixture(scope="module")
def sd3():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=16,
        ).eval()


@pytest.fixture(scope="module")
def flux():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        ).eval()


def run_unet(unet, timestep=500, batch=2, size=(8, 12), text=5):
    generator = torch.Generator().manual_seed(0)
    return unet(
        torch.randn(batch, 4, *size, generator=generator),
        timestep,
        encoder_hidden_states=torch.randn(batch, text, 8, generator=generator),
    ).sample


def run_sd3(sd3, timestep=500.0, batch=2):
    generator = torch.Generator().manual_seed(0)
    return sd3(
        hidden_states=torch.randn(batch, 4, 8, 12, generator=generator),
        encoder_hidden_states=torch.randn(batch, 5, 8, generator=generator),
        pooled_projections=torch.randn(batch, 8, generator=generator),
        timestep=torch.full((batch,), float(timestep)),
    ).sample


def run_flux(flux, timestep=0.5, batch=2):
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    return flux(
        hidden_states=torch.randn(batch, 24, 4, generator=generator),
        encoder_hidden_states=torch.randn(batch, 5, 8, generator=generator),
        pooled_projections=torch.randn(batch, 8, generator=generator),
        timestep=torch.full((batch,), float(timestep)),
        img_ids=torch.stack([torch.zeros(4, 6), rows, columns], -1).reshape(24, 3),
        txt_ids=torch.zeros(5, 3),
    ).sample


def factors_within(model, component, mix, run, names=("a", "plain"), layout=None, inputs=False):
    """Run a denoiser under a mix, and give the factors of each layer, None included, for its output's shape."""
    conditions, found, handles = Conditions({component: model}), {}, []
    conditions.set_mix(mix)

    def hook(name, kind):
        def ask(layer, args, output):
            found.setdefault(name, []).append(conditions.factors(names, name, output, kind))

        return ask

    try:
        for disk, live in live_layers(component, model).items():
            layer = model.get_submodule(live)
            kind = "conv" if isinstance(layer, torch.nn.Conv2d) else "linear"
            handles.append(layer.register_forward_hook(hook(f"{component}.{disk}", kind)))
        with torch.no_grad(), conditions.layout(layout) if layout else nullcontext():
            run(model)
    finally:
        conditions.detach()
        for handle in handles:
            handle.remove()
    return found


def of(found, ending):
    (name,) = [name for name in found if name.endswith(ending)]
    return found[name][0]


def test_nothing_varies_without_a_weight_that_does(unet):
    found = factors_within(unet, "unet", Mix.of(a=0.5, plain={"unet": 0.3}), run_unet)
    assert all(factor is None for factors in found.values() for factor in factors)
    found = factors_within(unet, "unet", Mix.of(b=Weight(schedule=Schedule.window(0, 0.5))), run_unet)
    assert all(factor is None for factors in found.values() for factor in factors)


@pytest.mark.parametrize(
    "timestep", [0, 250, 999, 700.5, torch.tensor(300), torch.tensor([40]), torch.tensor([900, 100])]
)
def test_a_schedule_reads_the_time_from_whatever_form_the_timestep_has(unet, timestep):
    schedule = Schedule(((0.0, 3.0), (0.4, 1.0), (1.0, -2.0)))
    found = factors_within(
        unet, "unet", Mix.of(a=Weight(0.7, schedule=schedule), plain=1.0), lambda m: run_unet(m, timestep)
    )
    expected = schedule.at(1 - torch.as_tensor(timestep).float().reshape(-1) / 999)
    for ending, shape in [("attn1.to_q", (1, 2)), ("conv1", (2, 1, 1)), ("time_emb_proj", (2,))]:
        factor = next(f[0] for name, f in found.items() if name.endswith(ending))
        assert factor.shape == (len(expected), *shape)
        flat = factor.reshape(len(expected), 2)
        torch.testing.assert_close(flat[:, 0], expected)
        assert (flat[:, 1] == 1).all()


def test_other_numbers_of_timesteps_are_other_times(unet):
    conditions = Conditions({"unet": unet}, timesteps=501)
    conditions.set_mix(Mix.of(a=Weight(schedule=Schedule(((0.0, 0.0), (1.0, 1.0))))))
    with torch.no_grad():
        run_unet(unet, 125)
    conditions.detach()
    assert conditions.factors(("a",), "unet.x", torch.zeros(2, 3), "linear").tolist() == [[0.75]]


def test_flow_models_times_are_read_as_they_are_passed(sd3, flux):
    mix = Mix.of(a=Weight(schedule=Schedule(((0.0, 0.0), (1.0, 1.0)))))
    for model, run, timestep in [(sd3, run_sd3, 999 * 0.25), (flux, run_flux, 0.25)]:
        found = factors_within(model, "transformer", mix, lambda m, r=run, t=timestep: r(m, t))
        torch.testing.assert_close(
            found["transformer.proj_out"][0][..., 0], torch.full((2, 1), 0.75), rtol=1e-6, atol=1e-6
        )


def test_text_encoders_take_a_schedules_value_at_noise_and_a_masks_mean():
    conditions = Conditions({"text_encoder": torch.nn.Linear(2, 2)})
    weight = Weight(0.5, schedule=Schedule(((0.0, 0.6), (1.0, 0.0))), mask=Mask([[0, 0, 0, 1]]))
    conditions.set_mix(Mix.of(a=weight))
    factor = conditions.factors(("plain", "a"), "text_encoder.fc1", torch.zeros(3, 7, 2), "linear")
    torch.testing.assert_close(factor, torch.tensor([[[1.0, 0.15]]]))


def test_a_mask_has_each_layers_own_resolution(unet):
    found = factors_within(unet, "unet", Mix.of(a=Weight(mask=Mask(RIGHT))), run_unet)
    expected = {
        "unet.conv_in": (8, 12),
        "unet.down_blocks.0.downsamplers.0.conv": (4, 6),
        "unet.mid_block.resnets.0.conv1": (2, 3),
        "unet.up_blocks.2.resnets.0.conv_shortcut": (8, 12),
    }
    for name, (height, width) in expected.items():
        factor = found[name][0]
        assert factor.shape == (1, 2, height, width)
        assert torch.equal(factor[0, 0], Mask(RIGHT).resized(height, width))
        assert (factor[0, 1] == 1).all()
    tokens = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": (8, 12),
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": (4, 6),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q": (2, 3),
        "unet.up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0": (8, 12),
    }
    for name, (height, width) in tokens.items():
        factor = found[name][0]
        assert factor.shape == (1, height * width, 2)
        assert torch.equal(factor[0, :, 0].reshape(height, width), Mask(RIGHT).resized(height, width))
    assert torch.equal(of(found, "time_embedding.linear_1"), torch.tensor([[0.5, 1.0]]))


@pytest.mark.parametrize("size", [(8, 8), (7, 13), (16, 4)])
def test_masks_fit_latents_of_every_size(unet, size):
    found = factors_within(unet, "unet", Mix.of(a=Weight(mask=Mask(RIGHT))), lambda m: run_unet(m, size=size))
    half = (-(-size[0] // 2), -(-size[1] // 2))
    to_k = found["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"][0]
    assert torch.equal(to_k[0, :, 0].reshape(half), Mask(RIGHT).resized(*half))


def test_layers_that_see_text_run_once_more_for_each_region(unet):
    left, right = Mask(1 - RIGHT), Mask(RIGHT)
    mix = Mix.of(a=Weight(mask=right), b=Weight(0.3, mask=right), c=Weight(mask=left), plain=1.0)
    found = factors_within(unet, "unet", mix, run_unet, names=("a", "b", "c", "plain"))
    to_v = found["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"]
    assert [factor.flatten().tolist() for factor in to_v] == [[0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 1]]
    assert all(len(factors) == 1 for name, factors in found.items() if "attn1" in name)
    found = factors_within(unet, "unet", mix, run_unet, names=("plain", "c"))
    assert len(found["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"]) == 2


def test_regions_take_over_the_attentions_output_in_their_places(unet):
    """The outputs of an attention whose text layers are changed in one region are the changed ones there alone."""
    conditions, attention = (
        Conditions({"unet": unet}),
        unet.mid_block.attentions[0].transformer_blocks[0].attn2,
    )
    outputs = []

    def change(layer, args, output):
        factor = conditions.factors(("a",), "unet.mid_block.attn2.to_v", output, "linear")
        return output * (1 + (1.0 if factor is None else factor))

    handles = [
        attention.to_v.register_forward_hook(change),
        attention.register_forward_hook(lambda module, args, output: outputs.append(output)),
    ]
    with torch.no_grad():
        for weight in (Weight(), Weight(mask=Mask(RIGHT)), Weight(mask=Mask(1 - RIGHT))):
            conditions.set_mix(Mix.of(a=weight))
            run_unet(unet, size=(8, 16))
    handles[0].remove()
    with torch.no_grad():
        run_unet(unet, size=(8, 16))
    handles[1].remove()
    conditions.detach()
    with_it, right, left, without = (output.reshape(2, 2, 4, -1) for output in outputs)
    # float32 sums: without + 1 * (with - without)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(right[:, :, 2:], with_it[:, :, 2:], **close)
    torch.testing.assert_close(right[:, :, :2], without[:, :, :2], **close)
    torch.testing.assert_close(left[:, :, :2], with_it[:, :, :2], **close)
    assert (with_it - without).abs().max() > 0.01


def test_joint_attention_blends_places_and_text(sd3):
    found = factors_within(sd3, "transformer", Mix.of(a=Weight(mask=Mask(RIGHT))), run_sd3, names=("a",))
    right = Mask(RIGHT).resized(4, 6)
    assert len(found["transformer.transformer_blocks.0.attn.add_k_proj"]) == 2
    assert torch.equal(found["transformer.transformer_blocks.0.attn.to_q"][0][0, :, 0].reshape(4, 6), right)
    assert found["transformer.transformer_blocks.0.ff_context.net.2"][0].flatten().tolist() == [0.5, 0.5]
    assert found["transformer.context_embedder"][0].flatten().tolist() == [0.5, 0.5]
    assert found["transformer.transformer_blocks.0.norm1.linear"][0].flatten().tolist() == [0.5, 0.5]
    assert found["transformer.pos_embed.proj"][0].shape == (2, 1, 4, 6)


def test_tokens_of_text_and_places_together_get_the_mean_and_the_mask(flux):
    found = factors_within(flux, "transformer", Mix.of(a=Weight(mask=Mask(RIGHT))), run_flux, names=("a",))
    single = found["transformer.single_transformer_blocks.0.attn.to_q"][0]
    assert single.shape == (2, 29, 1)
    assert (single[0, :5] == 0.5).all()
    assert torch.equal(single[0, 5:, 0].reshape(4, 6), Mask(RIGHT).resized(4, 6))


def test_places_of_packed_tokens_can_be_declared(flux):
    mix = Mix.of(a=Weight(mask=Mask(RIGHT)))
    layout = BatchLayout(2, places=(2, 12))
    found = factors_within(flux, "transformer", mix, run_flux, names=("a",), layout=layout)
    embedded = found["transformer.x_embedder"][0]
    assert torch.equal(embedded[0, :, 0].reshape(2, 12), Mask(RIGHT).resized(2, 12))


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        (BatchLayout(2), [1, 3]),
        (BatchLayout(2, 2), [1, 1, 3, 3]),
        (BatchLayout(2, 1, "uncond_first"), [0, 0, 1, 3]),
        (BatchLayout(2, 2, "uncond_first"), [0, 0, 0, 0, 1, 1, 3, 3]),
        (BatchLayout(2, 1, "uncond"), [0, 0]),
    ],
)
def test_each_row_of_a_batch_has_its_prompts_weight_and_its_branch(unet, layout, rows):
    mix = Mix.of(a=Weight(samples=(1.0, 3.0), conditional_only=True), b=Weight(samples=(1.0, 3.0)))
    found = factors_within(
        unet, "unet", mix, lambda m: run_unet(m, batch=layout.rows), names=("a", "b"), layout=layout
    )
    both = [row or (1, 3)[place // layout.per_prompt % 2] for place, row in enumerate(rows)]
    for ending in ("conv_in", "mid_block.attentions.0.proj_in", "time_embedding.linear_1"):
        factor = of(found, ending)
        assert factor.reshape(len(rows), 2).T.tolist() == [rows, both]
    conditions = Conditions({"text_encoder": torch.nn.Linear(2, 2)})
    conditions.set_mix(mix)
    with conditions.layout(layout):
        factor = conditions.factors(("b", "a"), "text_encoder.q", torch.zeros(len(rows), 4, 2), "linear")
    assert factor[:, 0].T.tolist() == [both, rows]


def test_all_that_varies_multiplies(unet):
    weight = Weight(
        schedule=Schedule(((0.0, 0.0), (1.0, 1.0))),
        mask=Mask(RIGHT),
        samples=(1.0, -2.0),
        conditional_only=True,
    )
    found = factors_within(
        unet,
        "unet",
        Mix.of(a=weight),
        lambda m: run_unet(m, 999 * 0.75, batch=4),
        names=("a",),
        layout=BatchLayout(2, 1, "uncond_first"),
    )
    expected = torch.tensor([0.0, 0, 0.25, -0.5])[:, None, None, None] * Mask(RIGHT).resized(8, 12)
    torch.testing.assert_close(found["unet.conv_in"][0], expected)
    to_k = found["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert to_k[0].flatten().tolist() == [0] * 4
    torch.testing.assert_close(to_k[1].flatten(), torch.tensor([0.0, 0, 0.25, -0.5]))


def test_an_undeclared_layout_is_refused(unet):
    for weight in (Weight(samples=(1.0, 0.0)), Weight(conditional_only=True)):
        with pytest.raises(BankError, match=r"declare it with bank\.batch"):
            factors_within(unet, "unet", Mix.of(a=weight), run_unet)


def test_a_layout_that_contradicts_the_batch_is_refused(unet):
    mix = Mix.of(a=Weight(samples=(1.0, 0.0)))
    with pytest.raises(
        BankError, match=r"linear_1 got a batch of 3, and the layout that was declared has 4 rows"
    ):
        factors_within(unet, "unet", mix, lambda m: run_unet(m, batch=3), layout=BatchLayout(2, 2))
    mix = Mix.of(a=Weight(conditional_only=True))
    with pytest.raises(BankError, match="a batch of 4, and the layout"):
        factors_within(unet, "unet", mix, lambda m: run_unet(m, batch=4), layout=BatchLayout(1))


def test_as_many_weights_as_prompts_are_needed(unet):
    conditions = Conditions({"unet": unet})
    conditions.detach()
    conditions.set_mix(Mix.of(a=Weight(samples=(1.0, 0.0))))
    with (
        pytest.raises(BankError, match="there are 3 prompts and 2 weights"),
        conditions.layout(BatchLayout(3)),
    ):
        pass
    with (
        conditions.layout(BatchLayout(2)),
        pytest.raises(BankError, match="there are 2 prompts and 1 weights"),
    ):
        conditions.set_mix(Mix.of(a=Weight(samples=(1.0,))))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((0,), "at least one prompt"),
        ((1, 0), "one row of each"),
        ((1, 1, "cond_first"), "'none', 'uncond_first' or 'uncond'; got 'cond_first'"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(values, reason):
    with pytest.raises(BankError, match=reason):
        BatchLayout(*values)


def test_a_layer_outside_its_denoiser_does_not_know_the_time(unet):
    conditions = Conditions({"unet": unet})
    conditions.detach()
    conditions.set_mix(Mix.of(a=Weight(schedule=Schedule.window(0, 0.5))))
    with pytest.raises(BankError, match=r"unet\.conv_in was called without its denoiser"):
        conditions.factors(("a",), "unet.conv_in", torch.zeros(1, 2, 3, 3), "conv")


def test_tokens_that_are_no_places_refuse_a_mask(unet):
    conditions = Conditions({"unet": unet})
    conditions.set_mix(Mix.of(a=Weight(mask=Mask(RIGHT))))
    with torch.no_grad():
        run_unet(unet)
    conditions.detach()
    with pytest.raises(
        BankError, match=r"cannot be laid on unet\.x, .*8 x 12 or 4 x 6 or 2 x 3 or 1 x 2 or 1 x 1"
    ):
        conditions.factors(("a",), "unet.x", torch.zeros(2, 97, 3), "linear")


def test_packed_tokens_of_unknown_places_refuse_a_mask(flux):
    conditions = Conditions({"transformer": flux})
    conditions.set_mix(Mix.of(a=Weight(mask=Mask(RIGHT))))
    conditions._places.learn({"hidden_states": torch.zeros(1, 24, 4)}, None)
    conditions.detach()
    conditions._now = torch.ones(1, 2)
    with pytest.raises(BankError, match=r"declare them with bank\.batch"):
        conditions.factors(("a",), "transformer.x_embedder", torch.zeros(1, 24, 3), "linear")


def test_what_varied_is_forgotten_with_its_mix(unet):
    conditions = Conditions({"unet": unet})
    conditions.set_mix(Mix.of(a=Weight(schedule=Schedule.window(0, 0.5))))
    assert conditions.varies
    conditions.set_mix(Mix.of(a=1.0))
    assert not conditions.varies
    assert conditions.factors(("a",), "unet.conv_in", torch.zeros(1, 2, 3, 3), "conv") is None
    conditions.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_conditions_pickle_with_their_model(unet):
    conditions = Conditions({"unet": unet})
    try:
        conditions.set_mix(Mix.of(a=Weight(mask=Mask(RIGHT))))
        again, model = pickle.loads(pickle.dumps((conditions, unet)))
    finally:
        conditions.detach()
    with torch.no_grad():
        run_unet(model)
    factor = again.factors(("a",), "unet.conv_in", torch.zeros(2, 8, 8, 12), "conv")
    assert torch.equal(factor[0, 0], Mask(RIGHT).resized(8, 12))


def test_factors_have_the_type_of_what_they_multiply(unet):
    mix = Mix.of(a=Weight(mask=Mask(RIGHT), schedule=Schedule.window(0, 0.9)))
    found = factors_within(unet.to(torch.bfloat16), "unet", mix, lambda m: run_unet_half(m))
    unet.float()
    assert {factor.dtype for factors in found.values() for factor in factors} == {torch.bfloat16}


def run_unet_half(unet):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = torch.randn(2, 5, 8, dtype=torch.bfloat16)
        return unet(torch.randn(2, 4, 8, 12, dtype=torch.bfloat16), 500, encoder_hidden_states=text).sample
