import json

import pytest
import torch

from mmpeft.adapter import load_adapter
from mmpeft.errors import FormatError
from mmpeft.key_formats import diffusers
from mmpeft.methods.dora import DoraLayer

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0.self_attn"

# (keys of down/A and up/B, the layer that they mean)
NAMES = {
    "new": (f"unet.{UNET}.to_q.lora_A.weight", f"unet.{UNET}.to_q.lora_B.weight", f"unet.{UNET}.to_q"),
    "lora.down": (
        f"unet.{UNET}.to_out.0.lora.down.weight",
        f"unet.{UNET}.to_out.0.lora.up.weight",
        f"unet.{UNET}.to_out.0",
    ),
    "text linear layer": (
        f"text_encoder.{TEXT}.q_proj.lora_linear_layer.down.weight",
        f"text_encoder.{TEXT}.q_proj.lora_linear_layer.up.weight",
        f"text_encoder.{TEXT}.q_proj",
    ),
    "text without its level": (
        "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ),
    "processor": (
        f"unet.{UNET}.processor.to_q_lora.down.weight",
        f"unet.{UNET}.processor.to_q_lora.up.weight",
        f"unet.{UNET}.to_q",
    ),
    "processor of the output": (
        f"unet.{UNET}.processor.to_out_lora.down.weight",
        f"unet.{UNET}.processor.to_out_lora.up.weight",
        f"unet.{UNET}.to_out.0",
    ),
    "processor without a component": (
        f"{UNET}.processor.to_v_lora.down.weight",
        f"{UNET}.processor.to_v_lora.up.weight",
        f"unet.{UNET}.to_v",
    ),
    "processor of added keys": (
        f"unet.{UNET}.processor.add_k_proj_lora.down.weight",
        f"unet.{UNET}.processor.add_k_proj_lora.up.weight",
        f"unet.{UNET}.add_k_proj",
    ),
    "model alone": (f"{UNET}.to_q.lora_A.weight", f"{UNET}.to_q.lora_B.weight", f"unet.{UNET}.to_q"),
    "transformer alone": (
        "transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer_blocks.0.attn.to_q.lora_B.weight",
        "transformer.transformer_blocks.0.attn.to_q",
    ),
    "convolution": (
        "unet.up_blocks.0.resnets.0.conv1.lora.down.weight",
        "unet.up_blocks.0.resnets.0.conv1.lora.up.weight",
        "unet.up_blocks.0.resnets.0.conv1",
    ),
    "old text encoder": (
        f"text_encoder.{TEXT}.to_out_lora.down.weight",
        f"text_encoder.{TEXT}.to_out_lora.up.weight",
        f"text_encoder.{TEXT}.out_proj",
    ),
    "second text encoder": (
        f"text_encoder_2.{TEXT}.k_proj.lora_A.weight",
        f"text_encoder_2.{TEXT}.k_proj.lora_B.weight",
        f"text_encoder_2.{TEXT}.k_proj",
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_every_naming_is_read(kind):
    down, up, layer = NAMES[kind]
    assert diffusers.is_ours([down])
    (name, found), *others = diffusers.read({down: A, up: B}, {}).items()
    assert not others
    assert name == layer
    assert torch.equal(found.lora_A, A)
    assert torch.equal(found.lora_B, B)
    assert found.alpha == 2.0  # no settings: alpha = rank


@pytest.mark.parametrize(
    "kind", ["new", "lora.down", "processor", "processor of the output", "text linear layer"]
)
def test_our_reading_is_what_diffusers_computes(kind, tiny_sd_folder, tmp_path):
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    down, up, layer = NAMES[kind]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    component, _, rest = layer.partition(".")
    module = getattr(pipe, component)
    target = module.get_submodule(rest.removeprefix("text_model."))
    before = target.weight.detach().clone()
    A, B = torch.randn(2, before.shape[1]), torch.randn(before.shape[0], 2)
    save_file({down: A, up: B}, tmp_path / "old.safetensors")
    pipe.load_lora_weights(str(tmp_path / "old.safetensors"))
    pipe.fuse_lora()
    ours = diffusers.read({down: A, up: B}, {})[layer].dense()
    torch.testing.assert_close(target.weight - before, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["sd", "sdxl"])
@pytest.mark.parametrize("form", ["metadata", "old names", "mixed old names", "model alone"])
def test_what_diffusers_saves_is_read_with_the_same_effect(
    form, base, open_sd, open_sdxl, add_peft_lora, tmp_path
):
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    pipe = open_sdxl() if base == "sdxl" else open_sd()
    alpha = (
        12 if form in ("metadata", "model alone") else 4
    )  # the others say nothing of alpha, which is the rank then
    changes = add_peft_lora(pipe, lora_alpha=alpha)
    components = [c for c in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, c, None) is not None]
    if form == "model alone":
        pipe.unet.save_lora_adapter(tmp_path)
        changes = {name: change for name, change in changes.items() if name.startswith("unet.")}
    else:
        states = {c: get_peft_model_state_dict(getattr(pipe, c), adapter_name="default") for c in components}
        settings = (
            _collate_lora_metadata({c: getattr(pipe, c) for c in components}) if form == "metadata" else {}
        )
        if form != "metadata":
            states = {c: convert_state_dict_to_diffusers(state) for c, state in states.items()}
        layers = {f"{c}_lora_layers": state for c, state in states.items()}
        type(pipe).save_lora_weights(tmp_path, **layers, **settings)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    if (
        form == "mixed old names"
    ):  # as diffusers 0.18 wrote attention layers, beside what it wrote of the others
        old = {}
        for key, tensor in load_file(file).items():
            for new, ancient in (
                (".to_out.0.lora.", ".processor.to_out_lora."),
                ("_proj.lora_linear_layer.", "_lora."),
            ):
                key = key.replace(new, ancient)
            for letter in "qkv":
                key = key.replace(f".to_{letter}.lora.", f".processor.to_{letter}_lora.")
                key = key.replace(f".self_attn.{letter}_lora.", f".self_attn.to_{letter}_lora.")
            old[key.replace(".self_attn.out_lora.", ".self_attn.to_out_lora.")] = tensor
        save_file(old, file)
    for given in (None, pipe):
        adapter = load_adapter(file, base=given)
        assert set(adapter) == set(changes)
        for name, change in changes.items():
            torch.testing.assert_close(adapter[name].dense(), change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["pipeline", "model alone"])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "OFT", "IA3"])
def test_other_methods_that_diffusers_saves_and_does_not_load_are_read(kind, form, open_sd, tmp_path):
    import peft as library
    from diffusers.training_utils import _collate_lora_metadata

    pipe = open_sd()
    settings = {
        "OFT": {"oft_block_size": 4, "use_cayley_neumann": False},
        "IA3": {"feedforward_modules": []},
    }.get(kind, {"r": 2, "alpha": 3})
    pipe.unet.add_adapter(getattr(library, f"{kind}Config")(target_modules=["to_q", "to_out.0"], **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    if form == "model alone":
        pipe.unet.save_lora_adapter(tmp_path)
    else:
        state = library.get_peft_model_state_dict(pipe.unet, adapter_name="default")
        type(pipe).save_lora_weights(
            tmp_path, unet_lora_layers=state, **_collate_lora_metadata({"unet": pipe.unet})
        )
    base = open_sd()
    adapter = load_adapter(tmp_path / "pytorch_lora_weights.safetensors", base=base)
    for name, layer in adapter.items():
        if name.endswith(".bias"):
            continue
        adapted = pipe.unet.get_submodule(name.removeprefix("unet."))
        plain = base.unet.get_submodule(name.removeprefix("unet."))
        x = torch.randn(5, plain.in_features, generator=generator)
        bias = adapter[f"{name}.bias"].dense() if f"{name}.bias" in adapter else 0
        change = x @ layer.dense().T + bias
        torch.testing.assert_close(plain(x) + change, adapted(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", ["lora_B.bias", "lora.up.bias", "lora_linear_layer.up.bias"])
def test_a_bias_in_lora_b_is_a_change_of_its_own(ending):
    tensors = {"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B, f"unet.a.{ending}": torch.ones(4)}
    settings = {"unet.r": 2, "unet.lora_alpha": 6, "unet.lora_bias": True}
    layers = diffusers.read(tensors, {"lora_adapter_metadata": json.dumps(settings)})
    torch.testing.assert_close(layers["unet.a.bias"].dense(), 3 * torch.ones(4))
    with pytest.raises(FormatError, match="sees pooled inputs"):
        diffusers.read(tensors, {"lora_adapter_metadata": json.dumps({**settings, "unet.use_qalora": True})})


@pytest.mark.parametrize("ending", [".alpha", ".lora.alpha", ".lora_linear_layer.alpha", ".to_q_lora.alpha"])
def test_an_alpha_counts_under_every_name(ending):
    layer = f"unet.{UNET}.to_q"
    key = f"unet.{UNET}.processor{ending}" if "to_q" in ending else layer + ending
    tensors = {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B, key: torch.tensor(7.0)}
    assert diffusers.read(tensors, {})[layer].alpha == 7.0


def test_settings_in_the_header_count():
    settings = {
        "unet.r": 8,
        "unet.lora_alpha": 16,
        "unet.rank_pattern": {"^a.b": 2, "c": 2},
        "unet.alpha_pattern": {"^a.b": 5},
        "unet.use_rslora": True,
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 3,
    }
    tensors = {}
    for name in ("unet.a.b", "unet.x.c", "text_encoder.a"):
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    layers = diffusers.read(tensors, {"lora_adapter_metadata": json.dumps(settings)})
    assert (layers["unet.a.b"].alpha, layers["unet.a.b"].rslora) == (5.0, True)
    assert layers["unet.x.c"].alpha == 16.0
    assert (layers["text_encoder.a"].alpha, layers["text_encoder.a"].rslora) == (3.0, False)


def test_an_alpha_tensor_counts():
    tensors = {"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B, "unet.a.alpha": torch.tensor(7.0)}
    assert diffusers.read(tensors, {})["unet.a"].alpha == 7.0
    with pytest.raises(FormatError, match="alpha twice"):
        diffusers.read(tensors, {"lora_adapter_metadata": json.dumps({"unet.r": 2})})


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_magnitudes_are_read_with_and_without_their_ending(ending):
    key = f"unet.a.lora_magnitude_vector{ending}"
    layer = diffusers.read({"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B, key: torch.ones(4)}, {})[
        "unet.a"
    ]
    assert isinstance(layer, DoraLayer)


def test_magnitudes_are_written_as_each_loader_wants_them():
    layer = DoraLayer(A, B, 2.0, lora_magnitude_vector=torch.ones(4))
    tensors, _ = diffusers.write({"unet": {"a": layer}, "text_encoder": {"a": layer}})
    assert "unet.a.lora_magnitude_vector" in tensors
    assert "text_encoder.a.lora_magnitude_vector.weight" in tensors


def test_strangers_keys_are_not_ours():
    assert not diffusers.is_ours(
        ["lora_unet_down_blocks_0.lora_down.weight", "base_model.model.a.lora_A.weight"]
    )
