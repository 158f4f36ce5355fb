import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mmpeft.adapter import Adapter, load_adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.errors import BaseMismatch, FormatError, MethodError
from mmpeft.exporting import export
from mmpeft.injection import shapes
from mmpeft.key_formats import kohya, kohya_names
from mmpeft.methods.dora import DoraLayer
from mmpeft.methods.full import FullLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.verification import predict

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)
PROMPTS = ["a red cat", "a dog in ink"]

# (flattened name, layer that it means)
NAMES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    ),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    ),
    "lora_unet_up_blocks_1_resnets_2_time_emb_proj": "unet.up_blocks.1.resnets.2.time_emb_proj",
    "lora_unet_down_blocks_2_downsamplers_0_conv": "unet.down_blocks.2.downsamplers.0.conv",
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    ),
    "lora_unet_input_blocks_8_1_proj_in": "unet.down_blocks.2.attentions.1.proj_in",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_middle_block_1_norm": "unet.mid_block.attentions.0.norm",
    "lora_unet_middle_block_2_emb_layers_1": "unet.mid_block.resnets.1.time_emb_proj",
    "lora_unet_output_blocks_5_0_in_layers_2": "unet.up_blocks.1.resnets.2.conv1",
    "lora_unet_output_blocks_5_0_skip_connection": "unet.up_blocks.1.resnets.2.conv_shortcut",
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_output_blocks_2_1_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_time_embed_2": "unet.time_embedding.linear_2",
    "lora_unet_label_emb_0_0": "unet.add_embedding.linear_1",
    "lora_unet_input_blocks_0_0": "unet.conv_in",
    "lora_unet_out_2": "unet.conv_out",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    ),
    "lora_te1_text_model_encoder_layers_11_mlp_fc1": "text_encoder.text_model.encoder.layers.11.mlp.fc1",
    "lora_te1_encoder_layers_11_mlp_fc1": "text_encoder.text_model.encoder.layers.11.mlp.fc1",
    "lora_te2_text_model_encoder_layers_31_self_attn_out_proj": (
        "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj"
    ),
    "lora_te2_text_projection": "text_encoder_2.text_projection",
    "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0": (
        "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wi_0"
    ),
    "lora_transformer_single_transformer_blocks_3_attn_to_q": (
        "transformer.single_transformer_blocks.3.attn.to_q"
    ),
    "lycoris_down_blocks_0_resnets_0_conv1": "unet.down_blocks.0.resnets.0.conv1",
    "lycoris_encoder_layers_0_self_attn_k_proj": "text_encoder.text_model.encoder.layers.0.self_attn.k_proj",
    "lycoris_transformer_blocks_0_attn_add_k_proj": "transformer.transformer_blocks.0.attn.add_k_proj",
    "lycoris_text_encoder_2_text_projection": "text_encoder_2.text_projection",
}


def pair(stem, rank=2, shape=(4, 3)):
    return {
        f"{stem}.lora_down.weight": torch.ones(rank, shape[1]),
        f"{stem}.lora_up.weight": torch.ones(shape[0], rank),
    }


@pytest.mark.parametrize("stem", NAMES)
def test_known_level_names_make_a_name_readable_without_the_base(stem):
    assert kohya.is_ours(pair(stem))
    assert list(kohya.read(pair(stem), {})) == [NAMES[stem]]


def test_every_layer_of_sdxl_has_one_original_name_that_leads_back():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048,
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    table = shapes({"unet": unet})
    layers = [name.removeprefix("unet.") for name in table if not name.endswith(".bias")]
    originals = {name: kohya_names.original_names(name)[0] for name in layers}
    assert len(set(originals.values())) == len(layers) == 1050
    lookup = kohya_names.lookup_table("unet", table, 2)
    for name, original in originals.items():
        for spelling in (name, original):
            flat = kohya_names.flattened(spelling)
            assert lookup[flat] == (f"unet.{name}",)
            assert kohya_names.from_vocabulary("unet", flat) == (name,)


@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_what_diffusers_exports_as_kohya_is_read_with_the_same_effect(
    base, open_sd, open_sdxl, add_peft_lora, tmp_path
):
    pipe = open_sdxl() if base == "sdxl" else open_sd()
    changes = add_peft_lora(pipe)
    save_file(diffusers_kohya(pipe), tmp_path / "x.safetensors")
    for given_base in (None, pipe):
        adapter = load_adapter(tmp_path / "x.safetensors", base=given_base)
        assert set(adapter) == set(changes)
        for name, change in changes.items():
            torch.testing.assert_close(adapter[name].dense(), change, rtol=1e-4, atol=1e-5)
    assert ("text_encoder_2" in adapter.components) == (base == "sdxl")


def diffusers_kohya(pipe):
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    found = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if hasattr(getattr(pipe, component, None), "peft_config"):
            state = get_peft_model_state_dict(getattr(pipe, component), adapter_name="default")
            found |= {f"{component}.{key}": value.contiguous() for key, value in state.items()}
    return convert_state_dict_to_kohya(found)


def test_the_dotted_magnitudes_of_diffusers_export_are_read(open_sd, add_peft_lora):
    pipe = open_sd()
    changes = add_peft_lora(pipe, only=("unet",), use_dora=True)
    tensors = diffusers_kohya(pipe)
    assert any(".to_q.lora_magnitude_vector" in key for key in tensors)
    layers = kohya.read(tensors, {}, shapes({"unet": pipe.unet}))
    for name, change in changes.items():
        weight = pipe.unet.get_submodule(name.removeprefix("unet.")).get_base_layer().weight
        torch.testing.assert_close(layers[name].dense(weight), change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_diffusers_computes_with_our_export_what_was_trained(
    base, open_sd, open_sdxl, add_peft_lora, predict_sdxl, tmp_path
):
    open_base = open_sdxl if base == "sdxl" else open_sd
    run = predict_sdxl if base == "sdxl" else lambda pipe: predict(pipe, PROMPTS)
    trained, plain = open_base(), open_base()
    changes = add_peft_lora(trained, lora_alpha=4)
    expected, before = run(trained), run(plain)
    file = export(peft_adapter(trained, alpha=4.0), tmp_path / "x.safetensors", format="kohya")
    keys = load_file(file).keys()
    assert any("input_blocks" in key for key in keys) == (base == "sdxl")
    assert any(key.startswith("lora_te_") for key in keys) == (base == "sd")
    plain.load_lora_weights(str(file))
    # float32 sums in another order; diffusers' reader is right where all alphas are the same
    torch.testing.assert_close(run(plain), expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).norm() > 0.05 * before.norm()
    assert set(load_adapter(file)) == set(changes)


def peft_adapter(pipe, alpha):
    from peft import get_peft_model_state_dict

    layers = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(pipe, component, None) is None:
            continue
        state = get_peft_model_state_dict(getattr(pipe, component), adapter_name="default")
        for key, lora_A in state.items():
            if key.endswith("lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                level = "text_model." if component != "unet" and name.startswith("encoder.") else ""
                lora_B = state[f"{name}.lora_B.weight"]
                layers[f"{component}.{level}{name}"] = LoraLayer(lora_A, lora_B, alpha)
    return Adapter(layers)


def test_lycoris_computes_with_our_export_what_was_trained(open_sd, attach_randomly, tmp_path):
    from lycoris import create_lycoris_from_weights

    trained, plain = open_sd(), open_sd()
    # alphas differ by layer, which diffusers' reader gets wrong and LyCORIS's right
    patterns = {
        "rank_pattern": {"*attn1.to_q": 2, "*.fc1": 3},
        "alpha_pattern": {"*.conv1": 5.5, "*.fc1": 1.0},
    }
    adapter = attach_randomly(trained, rank=4, alpha=3.0, **patterns)
    expected, before = predict(trained, PROMPTS), predict(plain, PROMPTS)
    tensors = load_file(export(adapter, tmp_path / "x.safetensors", format="kohya"))
    networks = []
    for component, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        # LyCORIS's wrapper calls every model's layers by their live names, which transformers 5 shortened
        own = {f"lycoris_{k.removeprefix(prefix)}": v for k, v in tensors.items() if k.startswith(prefix)}
        network, _ = create_lycoris_from_weights(1.0, None, getattr(plain, component), own)
        network.apply_to()
        networks.append(network)
    assert sum(len(network.loras) for network in networks) == len(adapter)
    torch.testing.assert_close(predict(plain, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_what_lycoris_saves_is_read_with_and_without_the_base(component, open_sd, tmp_path):
    from lycoris import LycorisNetwork, create_lycoris

    pipe = open_sd()
    model = getattr(pipe, component)
    LycorisNetwork.apply_preset({"lora_prefix": "lycoris", "enable_conv": True})
    network = create_lycoris(model, 1.0, 4, 3, preset="attn-mlp", warn_on_unmatched=False)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    network.save_weights(str(tmp_path / "x.safetensors"), None, {})
    bare = getattr(open_sd(), component)
    for base in (None, {component: bare}):
        adapter = load_adapter(tmp_path / "x.safetensors", base=base)
        assert len(adapter) == len(network.loras) > 10
        for lora in network.loras:
            stem = lora.lora_name
            name = next(
                n
                for n in adapter
                if stem.endswith(n.split(".", 1)[1].removeprefix("text_model.").replace(".", "_"))
            )
            change = lora.get_diff_weight(1.0, lora.org_module[0].weight.shape)[0]
            torch.testing.assert_close(
                adapter[name].dense().reshape(change.shape), change, rtol=1e-4, atol=1e-5
            )


def test_names_that_the_base_does_not_have_are_counted(open_sd, tmp_path):
    pipe = open_sd()
    good = {}
    for name in (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.proj_in",
    ):
        good |= pair(
            f"lora_unet_{name.replace('.', '_')}", shape=pipe.unet.get_submodule(name).weight.shape[:2]
        )
    strange = pair("lora_unet_down_blocks_7_attentions_0_proj_in") | pair("lora_te2_text_projection")
    for tensors, words in (
        (
            good | strange,
            "text_encoder_2 0 of 1, unet 2 of 3 names are layers of this base; not 'lora_te2_text_projection', 'lora_",
        ),
        (strange, "SDXL has, and this one has no text_encoder_2"),
        (pair("lora_unet_down_blocks_7_attentions_0_proj_in"), "belongs to another kind of base"),
        (good | pair("lora_te3_shared"), "the base that was given has no text_encoder_3"),
        (good | pair("lora_unet_down_blocks_7_conv"), "of another size"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(BaseMismatch, match=words):
            load_adapter(tmp_path / "x.safetensors", base=pipe)


def test_shapes_that_the_base_does_not_have_are_told(open_sd, tmp_path):
    save_file(pair("lora_unet_mid_block_attentions_0_proj_in"), tmp_path / "x.safetensors")
    with pytest.raises(
        BaseMismatch, match=r"0 of 1 layers match; unet.mid_block.attentions.0.proj_in has weight"
    ):
        load_adapter(tmp_path / "x.safetensors", base=open_sd())


def test_names_that_can_mean_two_layers_name_them():
    table = {"unet.a_b.c": (4, 3), "unet.a.b_c": (4, 3)}
    with pytest.raises(FormatError, match=r"'lora_unet_a_b_c' can mean unet.a_b.c or unet.a.b_c"):
        kohya.read(pair("lora_unet_a_b_c"), {}, table)
    both = {f"{c}.text_model.encoder.layers.0.mlp.fc1": (4, 3) for c in ("text_encoder", "text_encoder_2")}
    with pytest.raises(FormatError, match=r"text_encoder_2.text_model.*; give as base only the component"):
        kohya.read(pair("lycoris_encoder_layers_0_mlp_fc1"), {}, both)
    assert kohya.read(pair("lora_unet_a_b_c"), {}, {"unet.a_b.c": (4, 3)}).keys() == {"unet.a_b.c"}


def test_a_name_of_two_encoders_goes_to_the_one_that_it_fits(open_sdxl):
    base = shapes({name: getattr(open_sdxl(), name) for name in ("text_encoder", "text_encoder_2")})
    stem, layer = "lycoris_text_model_encoder_layers_0_mlp_fc1", "text_model.encoder.layers.0.mlp.fc1"
    for encoder in ("text_encoder", "text_encoder_2"):
        tensors = pair(stem, shape=base[f"{encoder}.{layer}"])
        assert list(kohya.read(tensors, {}, base)) == [f"{encoder}.{layer}"]


def test_unknown_names_ask_for_the_base_and_keys_of_others_are_refused():
    with pytest.raises(
        FormatError, match=r"unet 1 of 2 names can be read without the base; .*'lora_unet_my_block'"
    ):
        kohya.read(pair("lora_unet_my_block") | pair("lora_unet_conv_in"), {})
    with pytest.raises(FormatError, match=r"'bundle_emb.cat.clip_l' is no key of kohya's"):
        kohya.read({**pair("lora_unet_conv_in"), "bundle_emb.cat.clip_l": A}, {})
    with pytest.raises(FormatError, match="conv_in is there twice, under two names"):
        kohya.read(pair("lora_unet_conv_in") | pair("lora_unet_input_blocks_0_0"), {})
    with pytest.raises(FormatError, match="can be read without the base"):
        kohya.read(pair("lora_unet_" + "conv_in_" * 10_000), {})


def test_names_of_code_that_fuses_layers_are_told():
    for shapes_of_base in (None, {"transformer.a": (4, 3)}):
        with pytest.raises(
            FormatError, match=r"'lora_unet_double_blocks_0_img_attn_qkv' is a name of Flux's"
        ):
            kohya.read(pair("lora_unet_double_blocks_0_img_attn_qkv"), {}, shapes_of_base)


def test_a_missing_alpha_is_the_rank_and_half_precision_stays():
    tensors = {key: value.bfloat16() for key, value in pair("lora_unet_conv_in").items()}
    layer = kohya.read(tensors, {})["unet.conv_in"]
    assert (layer.alpha, layer.lora_A.dtype) == (2.0, torch.bfloat16)
    written, _ = kohya.write({"unet": {"conv_in": layer}})
    assert written["lora_unet_conv_in.lora_down.weight"].dtype == torch.bfloat16


def test_rs_lora_in_the_metadata_counts_where_the_file_does_not_tell():
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{name}.lokr_w1": torch.ones(2, 2),
        f"{name}.lokr_w2": torch.ones(2, 2),
        f"{name}.alpha": torch.tensor(8.0),
    }
    plain = kohya.read(tensors, {})["unet.mid_block.attentions.0.proj_in"]
    scaled = kohya.read(tensors, {"ss_network_args": json.dumps({"rs_lora": "True"})})
    assert not plain.rslora
    assert scaled["unet.mid_block.attentions.0.proj_in"].rslora
    assert kohya.read(tensors, {"ss_network_args": "{"}).keys() == scaled.keys()


def test_kohyas_own_oft_is_known_by_its_prefix_and_keeps_it():
    tensors = {
        "oft_unet_mid_block_attentions_0_proj_in.oft_blocks": torch.randn(2, 2, 2),
        "oft_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(0.0),
    }
    layer = kohya.read(tensors, {})["unet.mid_block.attentions.0.proj_in"]
    assert layer.freezes_at_zero
    assert kohya.write({"unet": {"mid_block.attentions.0.proj_in": layer}})[0].keys() == tensors.keys()


# --- what is written


def lora(rank=2, alpha=3.0, shape=(4, 3)):
    return LoraLayer(torch.ones(rank, *shape[1:]), torch.ones(shape[0], rank, *[1] * (len(shape) - 2)), alpha)


def test_rslora_is_folded_into_alpha():
    tensors, _ = kohya.write(
        {"unet": {"conv_in": LoraLayer(torch.ones(4, 3), torch.ones(4, 4), 6.0, rslora=True)}}
    )
    assert float(tensors["lora_unet_conv_in.alpha"]) == 12.0


def test_a_layer_and_its_bias_are_one_module_and_norms_too():
    layers = {
        "conv_in": lora(),
        "conv_in.bias": FullLayer(torch.ones(4)),
        "conv_norm_out": FullLayer(torch.ones(3)),
        "conv_norm_out.bias": FullLayer(torch.ones(3)),
    }
    tensors, _ = kohya.write({"unet": layers})
    assert {
        "lora_unet_conv_in.diff_b",
        "lora_unet_conv_norm_out.w_norm",
        "lora_unet_conv_norm_out.b_norm",
    } < set(tensors)
    back = kohya.read(tensors, {})
    assert same(back, {f"unet.{name}": layer for name, layer in layers.items()})


def test_what_has_no_name_is_refused():
    with pytest.raises(MethodError, match=r"unet.a.b and unet.a_b would both be called lora_unet_a_b"):
        kohya.write({"unet": {"a.b": lora(), "a_b": lora()}})
    with pytest.raises(MethodError, match="no place for audio_tower"):
        kohya.write({"audio_tower": {"a": lora()}})


def sketch(**layers):
    return {
        "prediction": "v",
        "layers": {name.replace("__", "."): [list(s), 1.0, [0.0] * 8] for name, s in layers.items()},
    }


@pytest.mark.parametrize(
    ("layers", "card", "version", "architecture"),
    [
        (
            {"unet": {"a.attn2.to_k": lora(shape=(4, 768))}},
            AdapterCard(),
            "sd_v1",
            "stable-diffusion-v1/lora",
        ),
        (
            {"unet": {"a.attn2.to_k": lora(shape=(4, 1024))}},
            AdapterCard(),
            "sd_v2",
            "stable-diffusion-v2-512/lora",
        ),
        (
            {"unet": {"a.to_q": lora()}},
            AdapterCard(fingerprint=sketch(unet__b__attn2__to_v=(4, 1024))),
            "sd_v2",
            "stable-diffusion-v2-768-v/lora",
        ),
        (
            {"unet": {"a.attn2.to_k": lora(shape=(4, 2048))}},
            AdapterCard(),
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base/lora",
        ),
        (
            {"text_encoder_2": {"a": lora()}},
            AdapterCard(),
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base/lora",
        ),
        (
            {"unet": {"a": lora()}},
            AdapterCard(base="some/sdxl-base-1.0"),
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base/lora",
        ),
        (
            {"text_encoder": {"a.q_proj": lora(shape=(4, 768))}},
            AdapterCard(),
            "sd_v1",
            "stable-diffusion-v1/lora",
        ),
        ({"transformer": {"a": lora()}}, AdapterCard(), None, None),
    ],
)
def test_the_kind_of_base_is_stated(layers, card, version, architecture):
    _, metadata = kohya.write(layers, card, title="ink")
    assert metadata.get("ss_base_model_version") == version
    assert metadata.get("modelspec.architecture") == architecture


def test_the_metadata_say_what_interfaces_sort_by_and_nothing_private():
    card = AdapterCard(
        base="pocket",
        trigger="in the style of ink",
        fingerprint=sketch(unet__a__to_q=(4, 3)),
        recipe={"data": {"resolution": 64, "folder": "/home/jane/photos"}, "out": "/home/jane/run"},
        data_digest="abc",
        metrics={"loss": 1.0},
    )
    layers = {"unet": {"a.to_q": lora(), "a.conv1": lora(rank=4, alpha=1.0, shape=(4, 3, 3, 3))}}
    _, metadata = kohya.write(layers, card, title="ink")
    assert {
        key: value for key, value in metadata.items() if not key.startswith("sshs_") and "hash" not in key
    } == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
        "ss_network_args": '{"conv_alpha": "1", "conv_dim": "4"}',
        "ss_output_name": "ink",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.implementation_version": "mmpeft/0.1.0",
        "modelspec.title": "ink",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "v",
        "modelspec.trigger_phrase": "in the style of ink",
    }
    assert metadata["modelspec.hash_sha256"] == f"0x{metadata['sshs_model_hash']}"
    assert "jane" not in json.dumps(metadata)


def test_the_hashes_are_those_that_web_interfaces_compute(tmp_path):
    import hashlib

    import safetensors.torch

    layer = LoraLayer(torch.randn(300, 600), torch.randn(600, 300, dtype=torch.float64), 4.0)
    tensors, metadata = kohya.write({"unet": {"conv_in": layer}}, title="ink")
    # as kohya's scripts do it: the library's own bytes, with the ss_ metadata alone
    data = safetensors.torch.save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def test_other_methods_are_stated_as_lycoris_does():
    dora = DoraLayer(A, B, 2.0, lora_magnitude_vector=torch.ones(4))
    _, metadata = kohya.write({"unet": {"a": dora}})
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"]) == {"algo": "locon", "dora_wd": "True"}


def same(ours, theirs):
    return set(ours) == set(theirs) and all(
        type(ours[name]) is type(layer)
        and ours[name].settings == layer.settings
        and all(
            torch.equal(t, ours[name].tensors[k]) and t.dtype == ours[name].tensors[k].dtype
            for k, t in layer.tensors.items()
        )
        for name, layer in theirs.items()
    )


LAYERS = {
    "unet": [
        "conv_in",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.resnets.0.conv1",
    ],
    "text_encoder": ["text_model.encoder.layers.0.mlp.fc1"],
    "text_encoder_2": ["text_projection"],
}
names = st.sampled_from([(component, name) for component, known in LAYERS.items() for name in known])
kinds = st.tuples(
    st.integers(1, 3),
    st.sampled_from([(4, 3), (4, 3, 3, 3), (4, 2, 1, 1)]),
    st.sampled_from([0.5, 1.0, 7.25, 1 / 3]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)


@given(parts=st.dictionaries(names, kinds, min_size=1))
def test_there_and_back_is_identity(parts):
    components = {}
    for (component, name), (rank, shape, alpha, is_dora, dtype) in parts.items():
        ones = [1] * (len(shape) - 2)
        A, B = torch.randn(rank, *shape[1:]).to(dtype), torch.randn(shape[0], rank, *ones).to(dtype)
        alpha = float(torch.tensor(alpha))  # a file's alpha is float32
        layer = LoraLayer(A, B, alpha)
        if is_dora:
            magnitude = torch.rand(1, shape[0], *ones) if ones else torch.rand(shape[0])
            layer = DoraLayer(A, B, alpha, lora_magnitude_vector=magnitude.to(dtype))
        components.setdefault(component, {})[name] = layer
    expected = {f"{c}.{name}": layer for c, layers in components.items() for name, layer in layers.items()}
    known = {name: tuple(layer.shape) for name, layer in expected.items()}
    for tensors, metadata in (kohya.write(components), kohya.write_with_names(components)):
        assert same(kohya.read(tensors, metadata), expected)
        assert same(kohya.read(tensors, metadata, known), expected)
