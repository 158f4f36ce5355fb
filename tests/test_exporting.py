import hashlib
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.errors import AdapterError, BaseMismatch, ConfigError, MethodError
from mmpeft.exporting import export, write
from mmpeft.methods.dora import DoraLayer
from mmpeft.methods.full import FullLayer
from mmpeft.methods.loha import LohaLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.verification import predict

PROMPTS = ["a red cat", "a dog in ink"]
UNET = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.mid_block.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture
def open_base(tiny_sd_folder):
    return lambda: StableDiffusionPipeline.from_pretrained(tiny_sd_folder)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def adapter():
    """Of the tiny Stable Diffusion, alpha and ranks by layer."""
    layers = {
        UNET: LoraLayer(drawn(2, 16), drawn(16, 2), 3.0),
        CONV: LoraLayer(drawn(3, 16, 3, 3), drawn(16, 3, 1, 1), 3.0),
        TEXT: LoraLayer(drawn(4, 16), drawn(32, 4), 1.0),
    }
    return Adapter(layers, AdapterCard(base="pocket", trigger="ink"))


@pytest.fixture
def loha():
    layers = {
        UNET: LohaLayer(drawn(16, 2), drawn(2, 16), drawn(16, 2), drawn(2, 16), alpha=1.0),
        CONV: LohaLayer(
            drawn(16, 2), drawn(2, 144), drawn(16, 2), drawn(2, 144), alpha=1.0, weight_shape=(16, 16, 3, 3)
        ),
    }
    return Adapter(layers)


def largest_difference(ours, theirs):
    assert set(ours) == set(theirs)
    return max(float((ours[n].dense() - theirs[n].dense()).norm() / theirs[n].dense().norm()) for n in theirs)


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_every_format_comes_back_with_the_same_effect(form, adapter, tmp_path):
    place = export(adapter, tmp_path / "out", format=form)
    if form != "peft":
        assert largest_difference(mmpeft.load_adapter(place), adapter) < 1e-6
        return
    parts = [mmpeft.load_adapter(place / component) for component in ("unet", "text_encoder")]
    assert largest_difference({**parts[0], **parts[1]}, adapter) < 1e-6


def test_files_lie_where_each_tool_looks_for_them(adapter, tmp_path):
    only_unet = Adapter({UNET: adapter[UNET]})
    for path, form, expected in (
        ("ink", "kohya", ["ink.safetensors"]),
        ("a/ink.safetensors", "kohya", ["a/ink.safetensors"]),
        ("b/ink.safetensors", "diffusers", ["b/ink.safetensors"]),
        ("c", "diffusers", ["c/pytorch_lora_weights.safetensors"]),
        ("d", "peft", ["d/adapter_config.json", "d/adapter_model.safetensors"]),
    ):
        before = files(tmp_path)
        place = export(only_unet, tmp_path / path, format=form)
        assert place.exists()
        assert sorted(files(tmp_path) - before) == expected
    export(adapter, tmp_path / "e", format="peft")
    assert {"e/unet/adapter_config.json", "e/text_encoder/adapter_config.json"} < files(tmp_path)


def files(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


# diffusers drops dora_scale from kohya files of Stable Diffusion, which the report says
@pytest.mark.parametrize(
    ("form", "method"), [("kohya", "lora"), ("diffusers", "lora"), ("diffusers", "dora")]
)
def test_diffusers_computes_with_the_export_what_was_trained(
    form, method, open_base, attach_randomly, tmp_path
):
    trained, plain = open_base(), open_base()
    # one alpha for all: diffusers' kohya reader gives others the wrong strength
    text = ("*.q_proj", "*.k_proj", "*.v_proj", "*.out_proj", "*.fc1", "*.fc2")
    adapter = attach_randomly(trained, method, rank=4, alpha=8.0, text_encoder=text)
    expected = predict(trained, PROMPTS)
    place = export(adapter, tmp_path / "x.safetensors", format=form)
    plain.load_lora_weights(str(place))
    torch.testing.assert_close(predict(plain, PROMPTS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT on transformers 5
def test_peft_computes_with_the_export_what_was_trained(open_base, attach_randomly, tmp_path):
    from peft import PeftModel

    trained, plain = open_base(), open_base()
    patterns = {"rank_pattern": {"*.to_k": 2}, "alpha_pattern": {"*.conv1": 5.5}}
    adapter = attach_randomly(trained, rank=4, alpha=3.0, **patterns)
    expected = predict(trained, PROMPTS)
    place = export(adapter, tmp_path / "x", format="peft")
    for component in ("unet", "text_encoder"):
        setattr(plain, component, PeftModel.from_pretrained(getattr(plain, component), place / component))
    torch.testing.assert_close(predict(plain, PROMPTS), expected, rtol=1e-4, atol=1e-5)


def test_other_methods_become_lora_at_a_told_error(loha, tmp_path):
    with pytest.raises(MethodError, match=r"has loha; give rank or error to make such layers LoRA"):
        export(loha, tmp_path / "x.safetensors", format="diffusers")
    assert not files(tmp_path)
    exact = write(
        loha, tmp_path / "exact.safetensors", "diffusers", rank=4
    )  # a product of ranks 2 and 2 has rank 4
    assert max(exact.errors.values()) < 1e-6
    assert largest_difference(mmpeft.load_adapter(exact.path), loha) < 1e-5
    report = write(loha, tmp_path / "short.safetensors", "diffusers", error=0.5)
    made = mmpeft.load_adapter(report.path)
    for name, layer in made.items():
        lost = float((layer.dense() - loha[name].dense()).norm() / loha[name].dense().norm())
        assert lost == pytest.approx(report.errors[name], abs=1e-4)
        assert 0 < lost <= 0.5
    assert "2 layers were made LoRA, which loses up to" in report.text()
    assert export(loha, tmp_path / "kohya").is_file()  # which has a form for it


def test_dora_becomes_lora_with_its_base(open_base, attach_randomly, tmp_path):
    trained, base = open_base(), open_base()
    adapter = attach_randomly(trained, "dora", rank=2, unet=("*.conv1",), text_encoder=())
    with pytest.raises(MethodError, match=r"cannot make .* LoRA: .*depends on the base's weight"):
        export(adapter, tmp_path / "x.safetensors", rank=4)
    report = write(adapter, tmp_path / "x.safetensors", base=base, error=1e-4)
    made = mmpeft.load_adapter(report.path, base=base)
    assert report.methods == {"lora": len(adapter)}
    for name, layer in adapter.items():
        change = layer.dense(base.unet.get_submodule(name.removeprefix("unet.")).weight)
        assert float((made[name].dense() - change).norm() / change.norm()) < 1.1e-4


def test_biases_and_norms_have_a_form_in_kohyas_files_only(adapter, tmp_path):
    changed = Adapter({**adapter, f"{UNET}.bias": FullLayer(torch.ones(16))})
    for form in ("diffusers", "peft"):
        with pytest.raises(
            MethodError, match=r"export as kohya, which also holds changed biases and norms \(1 here"
        ):
            export(changed, tmp_path / "x", format=form, rank=2)
    assert largest_difference(mmpeft.load_adapter(export(changed, tmp_path / "x")), changed) < 1e-6


def test_lora_and_dora_in_one_component_have_a_form_in_kohyas_files_only(adapter, tmp_path):
    dora = DoraLayer(drawn(2, 16), drawn(16, 2), 1.0, lora_magnitude_vector=torch.ones(16))
    mixed = Adapter({**adapter, UNET: dora})
    with pytest.raises(MethodError, match=r"LoRA and DoRA layers in one component .*; give rank or error"):
        export(mixed, tmp_path / "x", format="diffusers")
    report = write(mixed, tmp_path / "x")
    assert any("diffusers leaves out dora_scale" in note for note in report.notes)


def test_the_report_says_what_was_written(adapter, tmp_path):
    text = write(adapter, tmp_path / "x.safetensors").text()
    assert (
        f"wrote {tmp_path / 'x.safetensors'} in kohya's form: text_encoder 1 layers, unet 2 layers (lora on 3)"
        in text
    )
    assert "mind: diffusers gives attention layers with an alpha of their own the wrong strength" in text
    assert "mind" not in write(adapter, tmp_path / "y.safetensors", "diffusers").text()


def test_numbers_can_be_written_in_half_precision(adapter, tmp_path):
    tensors = load_file(export(adapter, tmp_path / "x", dtype="bf16"))
    factors = {tensor.dtype for key, tensor in tensors.items() if not key.endswith("alpha")}
    assert factors == {torch.bfloat16}
    assert largest_difference(mmpeft.load_adapter(tmp_path / "x.safetensors"), adapter) < 2 * 2**-8
    loud = Adapter({UNET: LoraLayer(1e6 * torch.ones(2, 16), drawn(16, 2), 1.0)})
    with pytest.raises(
        AdapterError, match=rf"{UNET} has numbers too large for torch.float16; choose bf16 or fp32"
    ):
        export(loud, tmp_path / "y", dtype="fp16")


def test_a_1x1_convolution_saved_as_linear_gets_the_bases_shape(open_base, tmp_path):
    name = "mid_block.attentions.0.proj_in"
    layer = LoraLayer(drawn(2, 16), drawn(16, 2), 2.0)
    plain, base = open_base(), open_base()
    place = export(
        Adapter({f"unet.{name}": layer}), tmp_path / "x.safetensors", format="diffusers", base=base
    )
    assert load_file(place)[f"unet.{name}.lora_A.weight"].shape == (2, 16, 1, 1)
    plain.load_lora_weights(str(place))
    plain.fuse_lora()
    change = plain.unet.get_submodule(name).weight - base.unet.get_submodule(name).weight
    torch.testing.assert_close(change[:, :, 0, 0], layer.dense(), rtol=1e-4, atol=1e-5)


def test_a_convolution_of_unknown_kernel_asks_for_the_base(open_base, tmp_path):
    flat = LohaLayer(drawn(16, 1), drawn(1, 144), drawn(16, 1), drawn(1, 144), alpha=1.0)
    with pytest.raises(
        MethodError, match=r"conv1 is a convolution whose kernel the file does not tell; give the base"
    ):
        export(Adapter({CONV: flat}), tmp_path / "x.safetensors", format="diffusers", rank=2)
    save_file(
        {f"lora_unet_{CONV[5:].replace('.', '_')}.{part}": t for part, t in flat.tensors.items()},
        tmp_path / "in.safetensors",
    )
    place = export(
        tmp_path / "in.safetensors", tmp_path / "x.safetensors", format="diffusers", rank=2, base=open_base()
    )
    assert mmpeft.load_adapter(place)[CONV].shape == (16, 16, 3, 3)


def test_only_an_adapter_is_replaced(adapter, tmp_path):
    export(adapter, tmp_path / "x.safetensors")
    digest = hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    export(adapter, tmp_path / "x.safetensors")
    assert hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest() == digest
    save_file({"model.diffusion_model.x": torch.ones(1)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(
        AdapterError, match=r"model.safetensors is there and is no adapter; choose another name"
    ):
        export(adapter, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    export(adapter, tmp_path / "p", format="peft")
    export(adapter, tmp_path / "p", format="peft")
    (tmp_path / "p" / "thesis.txt").write_text("mine")
    with pytest.raises(AdapterError, match="holds something else"):
        export(adapter, tmp_path / "p", format="peft")
    assert (tmp_path / "p" / "thesis.txt").read_text() == "mine"
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(AdapterError, match="is there and is no adapter"):
        export(adapter, tmp_path / "d.safetensors")
    assert not [name for name in files(tmp_path) if "/." in f"/{name}"]


def test_what_cannot_be_asked_for_is_told(adapter, tmp_path, open_base):
    for problem, words, asked in (
        (ConfigError, "no format is called 'koya'; did you mean 'kohya'", {"format": "koya"}),
        (ConfigError, "no dtype is called 'fp8'", {"dtype": "fp8"}),
        (ConfigError, "rank: must be a whole number of at least 1", {"rank": 0}),
        (BaseMismatch, "does not fit this base", {"base": open_base().text_encoder}),
    ):
        with pytest.raises(problem, match=words):
            export(Adapter({CONV: FullLayer(drawn(16, 16, 3, 3))}), tmp_path / "x", **asked)
    # of LoRA too, which stays as it is
    for words, asked in (
        ("rank: must be a whole number", {"rank": 0}),
        ("error: must be a share", {"error": 2}),
    ):
        with pytest.raises(ConfigError, match=words):
            export(adapter, tmp_path / "x", **asked)
    with pytest.raises(AdapterError, match="empty"):
        export(Adapter({}), tmp_path / "x")
    with pytest.raises(AdapterError, match="there is no adapter at"):
        export(tmp_path / "nothing", tmp_path / "x")
    assert not files(tmp_path)


def test_the_command_converts(adapter, tmp_path, capsys):
    from mmpeft.cli import make_app

    adapter.save(tmp_path / "in")
    tokens = [
        "convert",
        str(tmp_path / "in"),
        str(tmp_path / "ink.safetensors"),
        "--format",
        "kohya",
        "--dtype",
        "fp16",
    ]
    make_app(tokens)(tokens, exit_on_error=False, result_action="return_value")
    assert "in kohya's form" in capsys.readouterr().out
    tensors = load_file(tmp_path / "ink.safetensors")
    assert float(tensors[f"lora_unet_{UNET[5:].replace('.', '_')}.alpha"]) == 3.0
    tokens = ["inspect", str(tmp_path / "ink.safetensors"), "--json"]
    make_app(tokens)(tokens, exit_on_error=False, result_action="return_value")
    report = json.loads(capsys.readouterr().out)
    assert report["metadata"]["modelspec.trigger_phrase"] == "ink"
    assert report["metadata"]["ss_output_name"] == "ink"
