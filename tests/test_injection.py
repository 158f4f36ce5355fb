import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from mmpeft.errors import MethodError
from mmpeft.injection import disk_name, find_targets, is_adaptable, live_layers, shapes, vector_layers

GROUPS = {"attention": ("*.attn?.to_q", "*.self_attn.q_proj"), "mlp": ("*.ff.net.2", "*.mlp.fc?")}


@pytest.fixture(scope="module")
def pipeline(tiny_sd_folder):
    return StableDiffusionPipeline.from_pretrained(tiny_sd_folder)


def test_text_encoder_names_have_the_level_that_files_keep(pipeline):
    layers = live_layers("text_encoder", pipeline.text_encoder)
    assert layers["text_model.encoder.layers.0.self_attn.q_proj"].endswith(
        "encoder.layers.0.self_attn.q_proj"
    )
    assert all(name.startswith("text_model.encoder.layers.") for name in layers)


def test_text_encoders_of_both_live_shapes_have_the_same_disk_names(pipeline):
    class OlderTextModel(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.text_model, self.config = inner, inner.config

    older = OlderTextModel(pipeline.text_encoder)
    assert (
        live_layers("text_encoder", older).keys() == live_layers("text_encoder", pipeline.text_encoder).keys()
    )


def test_names_see_through_compile_and_data_parallel(pipeline):
    plain = live_layers("unet", pipeline.unet)
    compiled = live_layers("unet", torch.compile(pipeline.unet, backend="eager"))
    assert compiled.keys() == plain.keys()
    assert all(live.startswith("_orig_mod.") for live in compiled.values())
    assert live_layers("unet", nn.DataParallel(pipeline.unet)).keys() == plain.keys()


def test_names_see_through_peft(tiny_sd_folder):
    from peft import LoraConfig, get_peft_model

    unet = StableDiffusionPipeline.from_pretrained(tiny_sd_folder).unet
    plain = live_layers("unet", unet)
    wrapped = get_peft_model(unet, LoraConfig(target_modules=["to_q"], r=2))
    found = live_layers("unet", wrapped)
    assert found.keys() == plain.keys()
    to_q = next(live for disk, live in found.items() if disk.endswith("to_q"))
    assert to_q.startswith("base_model.model.")
    assert to_q.endswith("to_q.base_layer")


def test_disk_name_keeps_other_models_as_they_are():
    assert (
        disk_name("unet", "module.down_blocks.0._orig_mod.conv1.base_layer", nn.Module())
        == "down_blocks.0.conv1"
    )
    assert disk_name("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q", nn.Module()).startswith(
        "encoder.block"
    )


def test_only_weights_with_a_defined_change_are_adaptable():
    class QuantisedLinear(nn.Module):
        in_features, out_features = 4, 8

        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(16, dtype=torch.uint8))

    assert is_adaptable(nn.Linear(2, 3))
    assert is_adaptable(nn.Conv2d(2, 4, 3))
    assert is_adaptable(QuantisedLinear())
    assert not is_adaptable(nn.Conv2d(2, 4, 3, groups=2))
    assert not is_adaptable(nn.Embedding(2, 3))
    assert not is_adaptable(nn.MultiheadAttention(4, 2).out_proj)


def test_targets_may_be_groups_joined_groups_or_patterns(pipeline):
    attention = find_targets("unet", pipeline.unet, GROUPS, ["attention"])
    assert set(attention.values()) == {
        n for n in live_layers("unet", pipeline.unet) if n.endswith((".attn1.to_q", ".attn2.to_q"))
    }
    both = find_targets("unet", pipeline.unet, GROUPS, ["attention+mlp"])
    assert attention.keys() < both.keys()
    assert find_targets("unet", pipeline.unet, GROUPS, ["to_q"]) == attention
    conv_in = find_targets("unet", pipeline.unet, GROUPS, ["conv_in", "to_q"])
    assert conv_in.keys() - attention.keys() == {"conv_in"}


def test_a_pattern_with_a_component_in_front_speaks_of_that_component_alone(pipeline):
    targets = ["unet.*.to_q", "text_encoder.*.fc1"]
    assert all(n.endswith("to_q") for n in find_targets("unet", pipeline.unet, GROUPS, targets).values())
    text = find_targets("text_encoder", pipeline.text_encoder, GROUPS, targets)
    assert set(text.values()) == {f"text_model.encoder.layers.{i}.mlp.fc1" for i in (0, 1)}
    with pytest.raises(MethodError, match=r"no target speaks of text_encoder"):
        find_targets("text_encoder", pipeline.text_encoder, GROUPS, ["unet.*.to_q"])


def test_a_target_that_matches_nothing_is_an_error_with_a_near_miss(pipeline):
    with pytest.raises(MethodError, match=r"'\*\.to_qq' matches no layer of unet; did you mean 'to_q'"):
        find_targets("unet", pipeline.unet, GROUPS, ["attention", "*.to_qq"])
    with pytest.raises(MethodError, match=r"'atention' .* did you mean 'attention'"):
        find_targets("unet", pipeline.unet, GROUPS, ["atention"])


def test_a_target_that_can_be_adapted_only_in_part_names_the_share(pipeline):
    with pytest.raises(
        MethodError, match=r"2 of the 14 weights .* \(14 %\).*token_embedding|position_embedding"
    ):
        find_targets("text_encoder", pipeline.text_encoder, GROUPS, ["*"])


def test_fused_experts_are_named_as_missed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 8))

    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Experts(), "gate": nn.Linear(4, 2)})})
    with pytest.raises(MethodError, match=r"1 of the 2 weights .* \(50 %\).*mlp.experts.gate_up_proj"):
        find_targets("language_model", model, {}, ["mlp.*"])
    assert find_targets("language_model", model, {}, ["gate"]) == {"mlp.gate": "mlp.gate"}


def test_gains_and_biases_are_found_by_names_on_disk(pipeline):
    vectors = vector_layers("text_encoder", pipeline.text_encoder)
    live, attribute = vectors["text_model.final_layer_norm"]
    assert (live, attribute) == ("final_layer_norm", "weight")
    assert vectors["text_model.encoder.layers.0.mlp.fc1.bias"] == ("encoder.layers.0.mlp.fc1", "bias")
    assert not vectors.keys() & live_layers("text_encoder", pipeline.text_encoder).keys()


def test_shapes_name_every_parameter_but_embeddings(pipeline):
    modules = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    found = shapes(modules)
    for component, model in modules.items():
        parameters = {
            f"{component}.{disk_name(component, name, model)}".removesuffix(".weight"): tuple(value.shape)
            for name, value in model.named_parameters()
            if "embedding.weight" not in name
        }
        assert parameters == {
            name: shape for name, shape in found.items() if name.startswith(component + ".")
        }
