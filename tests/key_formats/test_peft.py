import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mmpeft.adapter_file as adapter_file
from mmpeft.errors import FormatError, MethodError
from mmpeft.key_formats import peft
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
        adapter = adapter_file.load(tmp_path / component)
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
        adapter_file.load(tmp_path)
    assert adapter_file.load(tmp_path, base=Strange()).layers == ("language_model.x",)
    assert adapter_file.load(tmp_path, base={"projector": Strange()}).layers == ("projector.x",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "PEFT's LOHA cannot be read"),
        ({"bias": "all"}, "it trains biases .bias = 'all'."),
        ({"lora_bias": True}, "biases in lora_B"),
        ({"modules_to_save": ["x"]}, "replaces whole modules"),
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
