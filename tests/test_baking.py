import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.backbones.fingerprint import Fingerprint
from mmpeft.baked_output import LINEAGE
from mmpeft.delta import add
from mmpeft.errors import ConfigError
from mmpeft.methods.full import FullLayer
from mmpeft.methods.lora import LoraLayer
from tests.conftest import tiny_stable_diffusion

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def adapters(attach_randomly):
    """Two LoRAs on UNet and text encoder, of ranks 4 and 2, and a DoRA."""
    settings = [("lora", 1, {"rank": 4}), ("lora", 2, {"rank": 2}), ("dora", 3, {"rank": 2})]
    return [
        attach_randomly(tiny_stable_diffusion("v"), method, seed, **more) for method, seed, more in settings
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny base in each float type; do not write into it."""
    root = tmp_path_factory.mktemp("bases")
    for name, dtype in TYPES.items():
        tiny_stable_diffusion("v").to(dtype).save_pretrained(root / name)
    return root


def opened(folder, dtype=torch.float32):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(dtype)


def outputs(pipeline):
    """What UNet and text encoder say about seeded inputs."""
    dtype = pipeline.unet.dtype
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(2, 6, 16, generator=generator).to(dtype)
    with torch.no_grad():
        return (
            pipeline.unet(latents, torch.tensor([10, 700]), text).sample,
            pipeline.text_encoder(torch.tensor([[3, 7, 1, 5]]))[0],
        )


def everything_in(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", TYPES)
def test_a_baked_folder_is_what_the_bank_fuses(name, folders, adapters, tmp_path):
    first, second, _ = adapters
    dtype = TYPES[name]
    report = mmpeft.bake(folders / name, [(first, 0.8), (second, -0.5)], tmp_path / "out")
    baked, pipeline = opened(tmp_path / "out", dtype), opened(folders / name, dtype)
    bank = mmpeft.attach(pipeline)
    bank.load(first, "first")
    bank.load(second, "second")
    bank.mix(first=0.8, second=-0.5)
    live = outputs(pipeline)
    bank.fuse()
    for ours, fused, unfused in zip(outputs(baked), outputs(pipeline), live, strict=True):
        assert torch.equal(ours, fused)
        # of activations: each layer rounds, in its own type, weights here and branches there
        tolerance = {"fp32": 1e-5, "bf16": 0.1, "fp16": 0.02}[name]
        assert (ours - unfused).abs().max() <= tolerance * unfused.abs().max()
    for component in ("unet", "text_encoder", "vae"):
        fused, ours = getattr(pipeline, component).state_dict(), getattr(baked, component).state_dict()
        assert all(torch.equal(ours[key], weight) for key, weight in fused.items())
    assert report.layers == tuple(sorted({*first.layers, *second.layers}))


def test_everything_else_is_copied_byte_for_byte(folders, adapters, tmp_path):
    report = mmpeft.bake(folders / "bf16", [(adapters[0], 1.0)], tmp_path / "out")
    before = {
        path.relative_to(folders / "bf16"): data for path, data in everything_in(folders / "bf16").items()
    }
    after = {
        path.relative_to(tmp_path / "out"): data for path, data in everything_in(tmp_path / "out").items()
    }
    changed = {path for path, data in before.items() if after[path] != data}
    assert {str(path) for path in changed} == {
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert set(after) - set(before) == {Path(LINEAGE)}
    assert report.bytes == sum(map(len, before.values()))
    for path in changed:
        length = 8 + int.from_bytes(before[path][:8], "little")
        assert after[path][:length] == before[path][:length]


def test_the_report_tells_what_rounding_lost(folders, adapters, tmp_path):
    small = [(adapters[0], 0.02)]
    reports = {name: mmpeft.bake(folders / name, small, tmp_path / name) for name in TYPES}
    weights = load_file(folders / "bf16" / "unet" / "diffusion_pytorch_model.safetensors")
    change = add([adapters[0][LAYER].delta().scaled(0.02)]).dense()
    weight = weights[f"{LAYER.removeprefix('unet.')}.weight"]
    rounded = (weight.float() + change).bfloat16().float() - weight.float()
    expected = float((rounded - change).norm() / change.norm())
    assert reports["bf16"].lost.layers[LAYER] == pytest.approx(expected, rel=1e-5)
    assert reports["fp32"].lost < 1e-4 < reports["fp16"].lost < reports["bf16"].lost
    text = reports["bf16"].text()
    assert "baked 1 adapter into" in text
    assert f"{len(adapters[0])} layers changed" in text
    assert "lost by rounding to BF16" in text


def test_a_method_that_needs_the_weight_gets_it_from_the_file(folders, adapters, tmp_path):
    mmpeft.bake(folders / "fp32", [(adapters[0], 0.5), (adapters[2], 0.7)], tmp_path / "out")
    pipeline = opened(folders / "fp32")
    bank = mmpeft.attach(pipeline)
    for name, adapter in (("lora", adapters[0]), ("dora", adapters[2])):
        bank.load(adapter, name)
    bank.mix(lora=0.5, dora=0.7)
    for ours, live in zip(outputs(opened(tmp_path / "out")), outputs(pipeline), strict=True):
        torch.testing.assert_close(ours, live, rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_weights_may_differ_by_component_and_block(folders, adapters, tmp_path):
    weight = {"unet": {"down": 0.5, "mid": 0.0}, "text_encoder": 2.0}
    report = mmpeft.bake(folders / "fp32", [(adapters[0], weight)], tmp_path / "out")
    assert not [layer for layer in report.layers if layer.startswith("unet.mid_block")]
    before = load_file(folders / "fp32" / "text_encoder" / "model.safetensors")
    after = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    (key, *_) = [key for key in before if key.endswith("layers.0.self_attn.q_proj.weight")]
    layer = adapters[0]["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(after[key] - before[key], 2 * layer.dense(), rtol=1e-4, atol=1e-6)


def test_biases_and_norms_are_baked_too(folders, tmp_path):
    names = {"unet.conv_norm_out": (8,), "unet.conv_norm_out.bias": (8,), "unet.conv_out.bias": (4,)}
    adapter = Adapter({name: FullLayer(torch.arange(float(shape[0]))) for name, shape in names.items()})
    mmpeft.bake(folders / "fp32", [(adapter, 0.5)], tmp_path / "out")
    before, after = opened(folders / "fp32").unet.state_dict(), opened(tmp_path / "out").unet.state_dict()
    changed = {
        key: after[key] - weight for key, weight in before.items() if not torch.equal(after[key], weight)
    }
    assert set(changed) == {"conv_norm_out.weight", "conv_norm_out.bias", "conv_out.bias"}
    for change in changed.values():
        torch.testing.assert_close(change, 0.5 * torch.arange(float(len(change))))


def test_the_pocket_base_is_baked_by_its_name(tmp_path):
    layer = LoraLayer(torch.ones(2, 192), torch.ones(192, 2), 2.0, False)
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    report = mmpeft.bake("pocket", [(Adapter({name: layer}), 1.0)], tmp_path / "out")
    assert report.types == ("F16",)
    assert json.loads((tmp_path / "out" / LINEAGE).read_text())["base"]["title"] == "pocket"


def test_text_encoders_are_found_with_and_without_the_level_that_transformers_dropped(
    folders, adapters, tmp_path
):
    file = "text_encoder/model.safetensors"
    results = []
    for add_level in (True, False):
        base = shutil.copytree(folders / "fp32", tmp_path / f"base{add_level}")
        weights = {key.removeprefix("text_model."): value for key, value in load_file(base / file).items()}
        level = "text_model." if add_level else ""
        save_file({level + key: value for key, value in weights.items()}, base / file, {"format": "pt"})
        mmpeft.bake(base, [(adapters[0], 1.0)], tmp_path / f"out{add_level}")
        baked = load_file(tmp_path / f"out{add_level}" / file)
        results.append({key.removeprefix(level): value for key, value in baked.items()})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_shards_and_other_types_of_the_same_weights_all_change(folders, adapters, tmp_path):
    pipeline = opened(folders / "fp32")
    pipeline.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    for component in ("unet", "text_encoder"):
        (half,) = (tmp_path / "half" / component).glob("*.fp16.safetensors")
        shutil.copy(half, tmp_path / "base" / component)
    shards = list((tmp_path / "base" / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 3
    report = mmpeft.bake(tmp_path / "base", [(adapters[0], 1.0)], tmp_path / "out")
    mmpeft.bake(folders / "fp32", [(adapters[0], 1.0)], tmp_path / "whole")
    ours, theirs = opened(tmp_path / "out"), opened(tmp_path / "whole")
    assert all(map(torch.equal, outputs(ours), outputs(theirs)))
    assert report.types == ("F16", "F32")
    unet = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for key, weight in theirs.unet.state_dict().items():
        # the half-precision copy was rounded before the change, and is once more after it
        torch.testing.assert_close(unet[key].float(), weight, rtol=2e-3, atol=1e-3)


def test_copies_of_the_weights_in_other_formats_stay_behind(folders, adapters, tmp_path):
    base = shutil.copytree(folders / "fp32", tmp_path / "base")
    for name in ("unet/diffusion_pytorch_model.bin", "whole.safetensors", "vae/diffusion_pytorch_model.bin"):
        (base / name).write_bytes(b"unchanged")
    report = mmpeft.bake(base, [(adapters[0], 1.0)], tmp_path / "out")
    assert not (tmp_path / "out" / "unet" / "diffusion_pytorch_model.bin").exists()
    assert not (tmp_path / "out" / "whole.safetensors").exists()
    assert (tmp_path / "out" / "vae" / "diffusion_pytorch_model.bin").read_bytes() == b"unchanged"
    assert any("unet/diffusion_pytorch_model.bin, whole.safetensors" in note for note in report.notes)


def test_the_same_bake_gives_the_same_bytes_and_says_what_went_in(folders, adapters, tmp_path):
    adapters[0].save(tmp_path / "style")
    for name in ("one", "two"):
        mmpeft.bake(folders / "bf16", {tmp_path / "style": 0.8}, tmp_path / name)
    one, two = everything_in(tmp_path / "one"), everything_in(tmp_path / "two")
    assert list(one.values()) == list(two.values())
    lineage = json.loads((tmp_path / "one" / LINEAGE).read_text())
    saved = mmpeft.load_adapter(tmp_path / "style")
    assert [(each["digest"], each["weight"]) for each in lineage["adapters"]] == [(saved.digest, 0.8)]
    assert set(Fingerprint.from_json(lineage["base"]["fingerprint"]).layers) == set(saved.layers)
    assert set(lineage["sha256"]) == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert str(tmp_path) not in json.dumps(lineage)
    assert lineage["base"]["baked"] is None
    again = mmpeft.bake(tmp_path / "one", [(adapters[1], 1.0)], tmp_path / "three")
    assert json.loads((again.out / LINEAGE).read_text())["base"]["baked"] == lineage


def test_an_earlier_bake_is_replaced_and_nothing_else_is(folders, adapters, tmp_path):
    out = tmp_path / "out"
    mmpeft.bake(folders / "fp32", [(adapters[0], 1.0)], out)
    first = (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    mmpeft.bake(folders / "fp32", [(adapters[0], 0.5)], out)
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("chapter one")
    with pytest.raises(ConfigError, match=r"mine holds something that is no earlier bake"):
        mmpeft.bake(folders / "fp32", [(adapters[0], 1.0)], tmp_path / "mine")
    assert (tmp_path / "mine" / "novel.txt").read_text() == "chapter one"


def test_the_command_prints_the_report(folders, adapters, tmp_path, capsys):
    from mmpeft.cli import make_app

    adapters[0].save(tmp_path / "a")
    adapters[1].save(tmp_path / "b")
    tokens = ["bake", str(folders / "bf16"), f"{tmp_path / 'a'}=0.8", f"{tmp_path / 'b'}", "--out"]
    with pytest.raises(SystemExit, match="0"):
        make_app(tokens)([*tokens, str(tmp_path / "out")])
    assert "baked 2 adapters into" in capsys.readouterr().out
    mmpeft.bake(folders / "bf16", [(adapters[0], 0.8), (adapters[1], 1.0)], tmp_path / "same")
    file = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()
