"""Files that are no adapter, or a broken one: each gives one clear sentence, and nothing is unpickled."""

import json
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import mmpeft
from mmpeft.adapter import Adapter, load_adapter
from mmpeft.errors import AdapterError, BaseMismatch, FormatError
from mmpeft.methods.lora import LoraLayer
from mmpeft.verification import predict


def good_file(folder):
    file = folder / "x.safetensors"
    save_file({"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(4, 2)}, file)
    return file


def raw(folder, header, data=b"", claim=None):
    file = folder / "x.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if claim is None else claim) + text + data)
    return file


def truncated(folder):
    file = good_file(folder)
    file.write_bytes(file.read_bytes()[:-10])
    return file


def zipped(folder):
    with zipfile.ZipFile(folder / "x.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    return folder / "x.safetensors"


def pickled(folder, name="x.safetensors"):
    (folder / name).write_bytes(pickle.dumps({"unet.a.lora_A.weight": [1.0] * 100}, protocol=2))
    return folder / name


def torch_saved(folder):
    torch.save({"a": torch.ones(3)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def saved(tensors, metadata=None):
    def write(folder):
        save_file({key: t.clone() for key, t in tensors.items()}, folder / "x.safetensors", metadata=metadata)
        return folder / "x.safetensors"

    return write


def peft_folder(config):
    def write(folder):
        save_file(
            {f"base_model.model.{k[5:]}": t for k, t in PAIR.items()}, folder / "adapter_model.safetensors"
        )
        (folder / "adapter_config.json").write_text(config)
        return folder

    return write


A, B = torch.ones(2, 3), torch.ones(4, 2)
PAIR = {"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B}
KOHYA = {"lora_unet_conv_in.lora_down.weight": A, "lora_unet_conv_in.lora_up.weight": B}
BROKEN = {
    "missing": (lambda folder: folder / "nothing", AdapterError, "there is no adapter at"),
    "empty folder": (lambda folder: folder, FormatError, "no .safetensors file; it has nothing"),
    "empty file": (
        lambda folder: raw(folder, b"", claim=0).write_bytes(b"") or folder / "x.safetensors",
        FormatError,
        "is empty",
    ),
    "a few bytes": (
        lambda folder: (folder / "x.safetensors").write_bytes(b"abc") and folder / "x.safetensors",
        FormatError,
        "truncated|no safetensors",
    ),
    "truncated": (truncated, FormatError, "truncated: its tensors need 56 bytes, 46 are there"),
    "header of 100 GB": (
        lambda folder: raw(folder, {}, claim=100 * 10**9),
        FormatError,
        "header claims 100,000,000,000 bytes",
    ),
    "header no JSON": (lambda folder: raw(folder, b"{not json"), FormatError, "no valid JSON table"),
    "header no table": (lambda folder: raw(folder, b"[1, 2, 3]"), FormatError, "no valid JSON table"),
    "header deep": (lambda folder: raw(folder, b"[" * 100_000), FormatError, "no valid JSON table"),
    "sizes disagree": (
        lambda folder: raw(
            folder, {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}, b"1234"
        ),
        FormatError,
        "contradicts itself about 'a'",
    ),
    "unknown type": (
        lambda folder: raw(folder, {"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        FormatError,
        "'a' has type Q4",
    ),
    "overlapping": (
        lambda folder: raw(
            folder, {k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}, b"12345678"
        ),
        FormatError,
        "no valid safetensors file",
    ),
    "no tensors": (
        lambda folder: raw(folder, {"__metadata__": {"format": "pt"}}),
        FormatError,
        "holds no tensors",
    ),
    "zip": (zipped, AdapterError, "a pickle under another name"),
    "torch.save": (torch_saved, AdapterError, "a pickle under another name"),
    "bare pickle": (pickled, AdapterError, "a pickle under another name"),
    "pickle by name": (
        lambda folder: pickled(folder, "x.bin"),
        AdapterError,
        "x.bin is a pickle, which can run code",
    ),
    "folder with a pickle": (
        lambda folder: pickled(folder, "a.ckpt").parent,
        AdapterError,
        "has only a.ckpt, a pickle",
    ),
    "NaN": (
        saved({**PAIR, "unet.a.lora_A.weight": A * float("nan")}),
        FormatError,
        r"unet.a has numbers that are not finite in lora_A \(100 %",
    ),
    "ranks differ": (
        saved({**PAIR, "unet.a.lora_B.weight": torch.ones(4, 3)}),
        FormatError,
        "unet.a has rank 2 in lora_A and 3 in lora_B",
    ),
    "half a layer": (saved({"unet.a.lora_A.weight": A}), FormatError, "unet.a has no lora_B"),
    "odd shapes": (
        saved({**PAIR, "unet.a.lora_A.weight": torch.ones(2, 3, 3)}),
        FormatError,
        "which make no layer",
    ),
    "magnitude": (
        saved({**PAIR, "unet.a.lora_magnitude_vector": torch.ones(3)}),
        FormatError,
        r"magnitudes \(3,\); \(4,\) are needed",
    ),
    "unknown key": (
        saved({**PAIR, "unet.a.hada_w1_a": A}),
        FormatError,
        "unet.a has hada_w1_a, and the header does not have the settings",
    ),
    "bias": (saved({**PAIR, "unet.a.lora_B.bias": A}), FormatError, r"unet.a has a bias \(2, 3\) in lora_B"),
    "two tools mixed": (
        saved({**PAIR, "lora_unet_a.lora_down.weight": A}),
        FormatError,
        "keys of 2 tools are mixed, kohya's 'lora_unet_a.lora_down.weight' and diffusers' 'unet.a.lora_A.weight'",
    ),
    "one part twice": (
        saved({**PAIR, "unet.a.lora.down.weight": A}),
        FormatError,
        "unet.a has its lora_A twice",
    ),
    "kohya": (
        saved({"lora_unet_a.lora_down.weight": A, "lora_unet_a.lora_up.weight": B}),
        FormatError,
        "unet 0 of 1 names can be read without the base; .* give the base",
    ),
    "no component": (saved({"a.lora_A.weight": A, "a.lora_B.weight": B}), FormatError, "without a component"),
    "whole model": (saved({"model.diffusion_model.x": A}), FormatError, "a whole model's"),
    "strangers": (saved({"hello": A}), FormatError, "no adapter's .first 'hello'"),
    "settings no JSON": (
        saved(PAIR, {"lora_adapter_metadata": "{"}),
        FormatError,
        "lora_adapter_metadata is no JSON object",
    ),
    "settings of another rank": (
        saved(PAIR, {"lora_adapter_metadata": '{"unet.r": 7}'}),
        FormatError,
        "rank 2, but the file's settings say 7",
    ),
    "alpha no number": (
        saved({**PAIR, "unet.a.alpha": torch.tensor(float("nan"))}),
        FormatError,
        "unet.a has alpha nan, which gives no finite change",
    ),
    "alpha a vector": (
        saved({**PAIR, "unet.a.alpha": torch.ones(2)}),
        FormatError,
        r"unet.a has alpha \(2,\); one number is needed",
    ),
    "whole numbers": (
        saved({**PAIR, "unet.a.lora_A.weight": A.int()}),
        FormatError,
        "unet.a has lora_A of type torch.int32; fractions are needed",
    ),
    "no rank": (
        saved({"unet.a.lora_A.weight": torch.ones(0, 3), "unet.a.lora_B.weight": torch.ones(4, 0)}),
        FormatError,
        "unet.a has no numbers in lora_A",
    ),
    **{
        f"settings {title}": (saved(PAIR, {"lora_adapter_metadata": text}), FormatError, words)
        for title, text, words in [
            ("nested too deep", "[" * 100_000, "lora_adapter_metadata is no JSON object"),
            ("with a rank that is no number", '{"unet.r": "x"}', "r = 'x'; a number is needed"),
            ("without alpha", '{"unet.lora_alpha": null}', "lora_alpha = 'None'; a number is needed"),
            (
                "with patterns in a list",
                '{"unet.alpha_pattern": [1]}',
                "alpha_pattern = .*; a table is needed",
            ),
            (
                "with a pattern that is none",
                '{"unet.rank_pattern": {"((": 2}}',
                "a regular expression without",
            ),
            (
                "with a pattern that never ends",
                '{"unet.alpha_pattern": {"(([a-z_.0-9]+)+)+X": 1}}',
                "without nested repetitions",
            ),
            ("of no method", '{"unet.peft_type": ["x"]}', "peft_type = .*; a name is needed"),
        ]
    },
    "layers nested too deep": (
        saved(KOHYA, {"mmpeft_layers": "[" * 100_000}),
        FormatError,
        "mmpeft_layers is no JSON object",
    ),
    **{
        f"PEFT's settings {title}": (peft_folder(text), FormatError, words)
        for title, text, words in [
            ("nested too deep", "[" * 100_000, "adapter_config.json is no JSON"),
            ("with a huge number", '{"r": ' + "9" * 5000 + "}", "adapter_config.json is no JSON"),
            ("with an endless rank", '{"r": Infinity}', "r = 'inf'; a number is needed"),
            ("with a version that is none", '{"peft_version": "new"}', "peft_version = 'new'; a version is"),
            ("with numbers for names", '{"feedforward_modules": [5]}', "a list of names or a regular"),
            ("with a mapping that is none", '{"auto_mapping": "x"}', "auto_mapping = 'x'; a table is needed"),
        ]
    },
    "card": (
        lambda folder: (folder / "adapter.json").write_text('{"parents": 5}') and saved(PAIR)(folder),
        FormatError,
        "adapter.json has parents '5'; a list is needed",
    ),
    "kohya NaN": (
        saved({**KOHYA, "lora_unet_conv_in.lora_up.weight": B * float("inf")}),
        FormatError,
        r"unet.conv_in has numbers that are not finite in lora_B \(100 %",
    ),
    "kohya alpha": (
        saved({**KOHYA, "lora_unet_conv_in.alpha": torch.tensor(float("inf"))}),
        FormatError,
        "unet.conv_in has alpha inf; a finite number is needed",
    ),
    "kohya ranks": (
        saved({**KOHYA, "lora_unet_conv_in.lora_up.weight": torch.ones(4, 3)}),
        FormatError,
        "unet.conv_in has rank 2 in lora_down.weight and 3 in lora_up.weight",
    ),
    "half a kohya layer": (
        saved({"lora_unet_conv_in.lora_up.weight": B}),
        FormatError,
        "unet.conv_in has no lora_down.weight",
    ),
    "two methods in a layer": (
        saved({**KOHYA, "lora_unet_conv_in.diff": A}),
        FormatError,
        "unet.conv_in has tensors of LoRA and of full",
    ),
    "unknown kohya tensor": (
        saved({**KOHYA, "lora_unet_conv_in.lora_sideways": A}),
        FormatError,
        "unet.conv_in has 'lora_sideways', which is no tensor of LoRA",
    ),
    "kohya and PEFT": (
        saved({**KOHYA, "base_model.model.a.lora_A.weight": A}),
        FormatError,
        "keys of 2 tools are mixed, PEFT's 'base_model.model.a.lora_A.weight' and kohya's",
    ),
    "kohya and strangers": (saved({**KOHYA, "hello": A}), FormatError, "'hello' is no key of kohya's"),
    "layers no JSON": (saved(KOHYA, {"mmpeft_layers": "{"}), FormatError, "mmpeft_layers is no JSON object"),
    "layers of no component": (
        saved(KOHYA, {"mmpeft_layers": '{"lora_unet_conv_in": "conv_in"}'}),
        FormatError,
        "mmpeft_layers has 'conv_in', which names no component",
    ),
    "peft without settings": (
        saved({f"base_model.model.{k[5:]}": t for k, t in PAIR.items()}),
        FormatError,
        "needs adapter_config.json",
    ),
}


# Files that are good, but not for the tiny base.
FOREIGN = {
    "other shapes": (saved(KOHYA), r"0 of 1 layers match; unet.conv_in has weight \(8, 4, 3, 3\)"),
    "other names": (
        saved({key.replace("conv_in", "input_blocks_8_1_proj_in"): t for key, t in KOHYA.items()}),
        "unet 0 of 1 names are layers of this base",
    ),
    "another component": (
        saved({key.replace("unet_conv_in", "te2_text_projection"): t for key, t in KOHYA.items()}),
        "this one has no text_encoder_2",
    ),
    "other shapes of diffusers": (
        saved({key.replace("unet.a", "unet.conv_in"): t for key, t in PAIR.items()}),
        "0 of 1 layers match; unet.conv_in has weight",
    ),
}


@pytest.fixture(scope="module")
def pipeline_with_bank(tiny_sd_folder):
    """A pipeline, its bank with one adapter mixed in, and what they compute."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    bank = mmpeft.attach(pipe)
    layer = LoraLayer(torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1), 1.0)
    bank.load(Adapter({"unet.conv_in": layer}), name="good")
    bank.mix(good=0.5)
    return pipe, bank, predict(pipe, ["a red cat"])


@pytest.mark.parametrize("kind", [*BROKEN, *FOREIGN])
def test_a_bad_file_changes_nothing_in_a_bank(kind, pipeline_with_bank, tmp_path):
    pipe, bank, before = pipeline_with_bank
    digest = bank.weights_digest()
    make, error, words = (
        BROKEN[kind] if kind in BROKEN else (FOREIGN[kind][0], BaseMismatch, FOREIGN[kind][1])
    )
    if kind in FOREIGN:
        with pytest.raises(error, match=words):
            mmpeft.load_adapter(make(tmp_path), base=pipe)
    with pytest.raises(AdapterError) as caught:
        bank.load(make(tmp_path), name="bad")
    assert "\n" not in str(caught.value)
    assert list(bank.adapters) == ["good"]
    assert bank.weights_digest() == digest
    assert torch.equal(predict(pipe, ["a red cat"]), before)


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_files_give_one_clear_sentence(kind, tmp_path):
    make, error, words = BROKEN[kind]
    path = make(tmp_path)
    with pytest.raises(error, match=words) as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_that_memory_cannot_hold_is_told(tmp_path, monkeypatch):
    def fail(file):
        raise RuntimeError("unable to mmap 80000000406 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr("safetensors.torch.load_file", fail)
    with pytest.raises(
        AdapterError, match=r"x.safetensors has [0-9]+ bytes, more than this machine can open"
    ):
        load_adapter(good_file(tmp_path))


def test_a_folder_with_several_files_is_not_guessed_at(tmp_path):
    for name in ("a", "b"):
        save_file(PAIR, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"name one of a.safetensors, b.safetensors"):
        load_adapter(tmp_path)
