import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from mmpeft.adapter import load_adapter
from mmpeft.errors import FormatError, MethodError
from mmpeft.exporting import export
from mmpeft.key_formats import peft, peft_component
from mmpeft.methods.lora import LoraLayer

A, B = torch.ones(2, 3), torch.ones(4, 2)
TENSORS = {"base_model.model.x.lora_A.weight": A, "base_model.model.x.lora_B.weight": B}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_what_peft_saves_is_read_with_the_same_effect(settings, tiny_sd_folder, tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    parts = {
        "unet": (["to_q", "conv1"], {"0.*to_q": 2}, {"conv1": 5}),
        "text_encoder": (["q_proj", "fc1"], {"fc1": 3}, {}),
    }
    for component, (targets, ranks, alphas) in parts.items():
        module = getattr(pipe, component)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **patterns, **settings)
        wrapped = get_peft_model(module, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    noise = torch.randn_like(parameter)
                    parameter.copy_(parameter * (1 + 0.2 * noise) if "magnitude" in name else noise)
        wrapped.save_pretrained(tmp_path / component)
        adapter = load_adapter(tmp_path / component)
        assert adapter.components == (component,)
        merged = wrapped.merge_and_unload()
        for name, layer in adapter.component(component).items():
            live = name.removeprefix("text_model.")
            weight = before[f"{live}.weight"]
            change = merged.get_submodule(live).weight - weight
            torch.testing.assert_close(layer.dense(weight), change, rtol=1e-4, atol=1e-5)
        assert any(layer.alpha == 5.0 for layer in adapter.values()) == (component == "unet")


def test_a_peft_file_of_an_unknown_component_asks_for_the_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Linear(3, 4)

        def forward(self, x):
            return self.x(x)

    base = Strange()
    get_peft_model(base, LoraConfig(r=2, target_modules=["x"])).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="give the base that it was trained on"):
        load_adapter(tmp_path)
    assert load_adapter(tmp_path, base=Strange()).layers == ("language_model.x",)
    assert load_adapter(tmp_path, base={"projector": Strange()}).layers == ("projector.x",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "VERA"}, "PEFT's VERA cannot be read; LORA, LOHA, LOKR, OFT, IA3 can"),
        ({"peft_type": "LOHA"}, "'base_model.model.x.lora_A.weight' is no key of a LOHA layer"),
        ({"modules_to_save": ["x"]}, "replaces whole modules"),
        ({"alora_invocation_tokens": [1]}, "only after some words of the prompt"),
        ({"use_qalora": True}, "sees pooled inputs"),
        ({"fan_in_fan_out": True}, "transposed"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "starts from pissa_niter_4, which changes the base's weights",
        ),
        ({"r": 5}, "x has rank 2, but the file's settings say 5"),
    ],
)
def test_settings_that_the_factors_do_not_hold_are_refused(change, words):
    peft.read(TENSORS, CONFIG)
    with pytest.raises(FormatError, match=words):
        peft.read(TENSORS, {**CONFIG, **change})


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.x(x))


@pytest.mark.filterwarnings(
    "ignore:Adapter 'default'. 1 LoRA tensor"
)  # PEFT takes its own bias for a broken factor
@pytest.mark.parametrize(
    "settings", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True, "lora_alpha": 6}]
)
def test_trained_biases_are_changes_of_the_base(settings, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, trained = Small(), Small()
    trained.load_state_dict(base.state_dict())
    wrapped = get_peft_model(trained, LoraConfig(r=2, target_modules=["x"], **settings))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, base={"projector": base})
    after = wrapped.merge_and_unload()
    changed = {"projector.x": "x.weight", "projector.x.bias": "x.bias", "projector.norm.bias": "norm.bias"}
    for name, layer in adapter.items():
        change = after.get_parameter(changed[name]) - base.get_parameter(changed[name])
        torch.testing.assert_close(layer.dense(), change, rtol=1e-4, atol=1e-6)
    assert ("projector.norm.bias" in adapter) == (settings.get("bias") == "all")
    assert "projector.x.bias" in adapter
    with pytest.raises(FormatError, match="give the base"):
        load_adapter(tmp_path)
    if "bias" in settings:
        other = nn.ModuleDict({"x": nn.Linear(3, 5)})
        with pytest.raises(FormatError, match=r"has a bias \(4,\) in the file, and none like it in the base"):
            load_adapter(tmp_path, base={"projector": other})


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "OFT", "IA3"])
def test_other_methods_go_through_us_with_the_same_effect(kind, tmp_path):
    import peft as library

    torch.manual_seed(0)
    base, trained = Small(), Small()
    trained.load_state_dict(base.state_dict())
    settings = {
        "OFT": {"oft_block_size": 3, "use_cayley_neumann": False},
        "IA3": {"feedforward_modules": []},
    }.get(kind, {"r": 2, "alpha": 3})
    config = getattr(library, f"{kind}Config")(target_modules=["x"], **settings)
    wrapped = library.get_peft_model(trained, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs", base={"projector": base})
    x = torch.randn(5, 3)
    expected = wrapped(x)
    weight = base.x.weight + adapter["projector.x"].dense()
    bias = base.x.bias + (adapter["projector.x.bias"].dense() if "projector.x.bias" in adapter else 0)
    torch.testing.assert_close(
        base.norm(torch.nn.functional.linear(x, weight, bias)), expected, rtol=1e-4, atol=1e-5
    )
    ours = export(adapter, tmp_path / "ours", format="peft")
    fresh = Small()
    fresh.load_state_dict(base.state_dict())
    again = library.PeftModel.from_pretrained(fresh, ours)
    torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-5)


def test_old_configurations_lack_what_came_later_and_are_read():
    old = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "rank_pattern": {"x": 2},
        "bias": "none",
        "use_dora": False,
    }
    layer = peft.read(TENSORS, old)["x"]
    assert (layer.rank, layer.alpha, layer.rslora) == (2, 16.0, False)


@pytest.mark.parametrize(
    ("config", "names", "component"),
    [
        ({"auto_mapping": {"base_model_class": "CLIPTextModelWithProjection"}}, ["a"], "text_encoder_2"),
        ({"auto_mapping": {"base_model_class": "FluxTransformer2DModel"}}, ["a"], "transformer"),
        ({"task_type": "CAUSAL_LM"}, ["model.layers.0.self_attn.q_proj"], "language_model"),
        ({}, ["down_blocks.0.resnets.0.conv1", "add_embedding.linear_1"], "unet"),
        ({}, ["x"], None),
    ],
)
def test_the_component_is_told_by_the_configuration_or_the_names(config, names, component):
    assert peft_component.component_of(names, config) == component


def test_unknown_keys_are_refused():
    with pytest.raises(FormatError, match=r"'base_model.model.x.lora_embedding_A' is no key"):
        peft.read({**TENSORS, "base_model.model.x.lora_embedding_A": A}, CONFIG)


names = st.lists(st.sampled_from(["a", "b", "to_q", "1", "11", "conv"]), min_size=1, max_size=4).map(".".join)
numbers = st.tuples(st.integers(1, 3), st.sampled_from([0.5, 1.0, 2.0]), st.booleans())


@given(layers=st.dictionaries(names, numbers, min_size=1, max_size=6))
def test_written_settings_mean_the_same_to_peft(layers):
    from peft.utils.other import get_pattern_key

    made = {
        n: LoraLayer(torch.ones(rank, 3), torch.ones(4, rank), alpha, rslora)
        for n, (rank, alpha, rslora) in layers.items()
    }
    config = peft.lora_config(made)
    for name, layer in made.items():
        rank = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], name), config["r"])
        alpha = config["alpha_pattern"].get(
            get_pattern_key(config["alpha_pattern"], name), config["lora_alpha"]
        )
        assert rank == layer.rank
        assert alpha / (rank**0.5 if config["use_rslora"] else rank) == pytest.approx(layer.scale)
        assert peft.settings_of(config, name) == (rank, alpha, config["use_rslora"])


def test_two_methods_in_one_component_are_refused():
    from mmpeft.methods.dora import DoraLayer

    layers = {"a": LoraLayer(A, B, 1.0), "b": DoraLayer(A, B, 1.0, lora_magnitude_vector=torch.ones(4))}
    with pytest.raises(MethodError, match="LoRA and DoRA layers in one component"):
        peft.lora_config(layers)


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_names_of_any_text_encoder_go_to_the_one_that_they_fit(form, open_sdxl, add_peft_lora, tmp_path):
    from peft.utils import get_peft_model_state_dict

    pipe = open_sdxl()
    changes = add_peft_lora(pipe, only=("text_encoder_2",))
    state = {
        key: tensor.contiguous() for key, tensor in get_peft_model_state_dict(pipe.text_encoder_2).items()
    }
    path = tmp_path / "bare.safetensors"
    save_file(state, path)
    if form == "peft":
        pipe.save_lora_weights(tmp_path / "named", text_encoder_2_lora_layers=state)
        path = export(tmp_path / "named", tmp_path / "exported", format="peft")
    read = load_adapter(path, base=open_sdxl())
    assert set(read) == set(changes)
    for name, change in changes.items():
        torch.testing.assert_close(read[name].dense(), change, rtol=1e-4, atol=1e-5)
