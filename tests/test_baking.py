import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.backbones.fingerprint import Fingerprint
from mmpeft.baked_output import LINEAGE
from mmpeft.delta import add
from mmpeft.errors import BaseError, BaseMismatch, ConfigError, FormatError, MethodError
from mmpeft.methods.full import FullLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.mix import Schedule, Weight
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


def test_weights_may_go_by_blocks_that_the_adapter_lacks_and_the_base_has(folders, adapters, tmp_path):
    text = Adapter({name: layer for name, layer in adapters[0].items() if name.startswith("text_encoder")})
    weight = {"unet": {"down": 0.5}, "text_encoder": 2.0}
    report = mmpeft.bake(folders / "fp32", [(text, weight)], tmp_path / "out")
    assert report.layers == text.layers


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


def test_a_single_file_stays_one(single_file, config_folder, adapters, folders, tmp_path):
    from mmpeft.backbones.stable_diffusion_files import load_pipeline

    out = tmp_path / "out.safetensors"
    report = mmpeft.bake(single_file, [(adapters[0], 0.8), (adapters[1], 0.3)], out)
    mmpeft.bake(folders / "fp32", [(adapters[0], 0.8), (adapters[1], 0.3)], tmp_path / "folder")
    loaded = load_pipeline(str(out), config_folder)
    assert all(map(torch.equal, outputs(loaded), outputs(opened(tmp_path / "folder"))))
    before, after = load_file(single_file), load_file(out)
    assert list(before) == list(after)
    changed = [key for key, weight in before.items() if not torch.equal(weight, after[key])]
    assert len(changed) == len(report.layers)
    assert not [key for key in changed if key.startswith("first_stage_model.")]
    assert json.loads((tmp_path / f"out.{LINEAGE}").read_text())["base"]["title"] == "tiny-single"
    mmpeft.bake(single_file, [(adapters[0], 0.8)], out)
    (tmp_path / f"out.{LINEAGE}").unlink()
    with pytest.raises(ConfigError, match=r"out.safetensors holds something that is no earlier bake"):
        mmpeft.bake(single_file, [(adapters[0], 0.8)], out)


def test_parts_of_one_tensor_change_alone(tmp_path, single_file):
    """OpenCLIP holds q, k and v in one tensor; three adapters' layers meet in it."""
    generator = torch.Generator().manual_seed(0)
    key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    weights = {name: w for name, w in load_file(single_file).items() if name.startswith("model.")}
    weights |= {key: torch.randn(24, 8, generator=generator), f"{key[:-6]}bias": torch.zeros(24)}
    save_file(weights, tmp_path / "sd2.safetensors", {"made": "here"})
    layer = "text_encoder.text_model.encoder.layers.0.self_attn"
    change = torch.randn(8, 8, generator=generator)
    adapter = Adapter(
        {f"{layer}.k_proj": FullLayer(change), f"{layer}.v_proj.bias": FullLayer(torch.ones(8))}
    )
    mmpeft.bake(tmp_path / "sd2.safetensors", [(adapter, 0.5)], tmp_path / "out.safetensors")
    after = load_file(tmp_path / "out.safetensors")
    expected = weights[key].clone()
    expected[8:16] += 0.5 * change
    assert torch.equal(after[key], expected)
    assert torch.equal(after[f"{key[:-6]}bias"], torch.tensor([0.0] * 16 + [0.5] * 8))
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"made": "here"}


def tiny_llama(**config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **config)).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama's folder in shards, an adapter that PEFT made for it, and what PEFT makes it say."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(root / "base", max_shard_size="10KB")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT asks transformers 5 for an attribute of its past
        model = get_peft_model(tiny_llama(), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        logits = model(torch.arange(6)[None]).logits
    model.save_pretrained(root / "adapter")
    return root, logits


def test_a_language_model_is_baked_with_an_adapter_that_peft_made(llama, tmp_path):
    from transformers import LlamaForCausalLM

    root, logits = llama
    assert len(list((root / "base").glob("*.safetensors"))) > 1
    report = mmpeft.bake(root / "base", {root / "adapter": 1.0}, tmp_path / "out")
    baked = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(baked(torch.arange(6)[None]).logits, logits, rtol=1e-4, atol=1e-5)
    assert len(report.layers) == 4
    assert report.notes == ()


def test_a_language_model_s_layers_are_found_whatever_class_it_was_saved_from(llama, tmp_path):
    root, _ = llama
    tiny_llama().model.save_pretrained(tmp_path / "bare")
    assert not [key for key in load_file(tmp_path / "bare" / "model.safetensors") if key.startswith("model.")]
    report = mmpeft.bake(tmp_path / "bare", {root / "adapter": 1.0}, tmp_path / "out")
    assert len(report.layers) == 4


def test_tied_weights_are_mentioned_when_touched(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    change = torch.ones(40, 16)
    head = Adapter({"language_model.lm_head": FullLayer(change)})
    report = mmpeft.bake(tmp_path / "base", [(head, 0.5)], tmp_path / "out")
    (note,) = report.notes
    assert "lm_head.weight and language_model.model.embed_tokens.weight are one weight" in note
    key = "model.embed_tokens.weight"
    before, after = (load_file(tmp_path / name / "model.safetensors")[key] for name in ("base", "out"))
    torch.testing.assert_close(after, before + 0.5)
    query = Adapter({"language_model.model.layers.0.self_attn.q_proj": FullLayer(torch.ones(16, 16))})
    assert mmpeft.bake(tmp_path / "base", [(query, 0.5)], tmp_path / "other").notes == ()


def test_a_hub_name_is_found_in_the_cache(folders, adapters, tmp_path, monkeypatch):
    place = tmp_path / "cache" / "models--me--tiny"
    shutil.copytree(folders / "fp32", place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    mmpeft.bake("me/tiny", [(adapters[0], 1.0)], tmp_path / "out")
    assert json.loads((tmp_path / "out" / LINEAGE).read_text())["base"]["title"] == "me/tiny"
    with pytest.raises(BaseError, match=r"there is no folder me/other here, and no base .* cache"):
        mmpeft.bake("me/other", [(adapters[0], 1.0)], tmp_path / "other")


MEMORY = """
import json, sys
from pathlib import Path
import torch
import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.methods.lora import LoraLayer
from mmpeft.mix import Schedule, Weight

def base(folder, layers):
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    size, header = 4 * 2048 * 2048, {}
    for n in range(layers):
        header[f"blocks.{n}.to_q.weight"] = {
            "dtype": "F32", "shape": [2048, 2048], "data_offsets": [n * size, (n + 1) * size]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + layers * size)

def adapter(layers):
    names = [f"transformer.blocks.{n}.to_q" for n in range(layers)]
    return Adapter({name: LoraLayer(torch.ones(2, 2048), torch.ones(2048, 2), 2.0, False) for name in names})

def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

root = Path(sys.argv[1])
base(root / "small", 1)
base(root / "large", 18)
mmpeft.bake(root / "small", [(adapter(1), 1.0)], root / "first")
before = peak()
mmpeft.bake(root / "large", [(adapter(18), 1.0)], root / "second")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of the memory from Linux")
def test_memory_is_bounded_by_the_largest_layer(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    # 18 layers of 16 MB after 1 of them: nothing may come on top but the allocator's slack, which a few layers bound
    assert float(run.stdout) < 4 * 16
    assert (tmp_path / "second" / "model.safetensors").stat().st_size > 18 * 16e6


# What cannot be baked: one sentence, and nothing is written.


def refusal(folder, base, mix, out="out", **more):
    """Bake, which must fail; give the sentence, after a look that nothing was left behind."""
    before = everything_in(folder)
    with pytest.raises(mmpeft.MmpeftError) as caught:
        mmpeft.bake(base, mix, folder / out, **more)
    assert everything_in(folder) == before
    assert "\n" not in str(caught.value)
    return type(caught.value), str(caught.value)


def full(name, *shape, value=1.0):
    return Adapter({name: FullLayer(torch.full(shape, value))})


def test_a_base_that_is_not_there_or_broken_is_refused(folders, adapters, tmp_path):
    mix = [(adapters[0], 1.0)]
    kind, sentence = refusal(tmp_path, str(tmp_path / "none"), mix)
    assert (kind, sentence) == (BaseError, f"there is no base {tmp_path / 'none'}")
    (tmp_path / "old.ckpt").write_bytes(b"PK")
    assert "old.ckpt is no .safetensors file" in refusal(tmp_path, tmp_path / "old.ckpt", mix)[1]
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    assert (
        "is no single-file checkpoint of Stable Diffusion"
        in refusal(tmp_path, tmp_path / "other.safetensors", mix)[1]
    )
    (tmp_path / "empty").mkdir()
    assert "is no model folder" in refusal(tmp_path, tmp_path / "empty", mix)[1]
    base = shutil.copytree(folders / "fp32", tmp_path / "base")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "diffusion_pytorch_model.safetensors cannot be read" in refusal(tmp_path, base, mix)[1]
    (base / "unet" / "config.json").write_text("{")
    assert "config.json is no JSON" in refusal(tmp_path, base, mix)[1]


def test_a_missing_shard_is_named(llama, tmp_path):
    root, _ = llama
    base = shutil.copytree(root / "base", tmp_path / "base")
    shard = sorted(base.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    kind, sentence = refusal(tmp_path, base, {root / "adapter": 1.0})
    assert kind is BaseError
    assert f"base is not whole: model.safetensors.index.json names {shard.name}" in sentence


@pytest.mark.parametrize("how", ["config", "type"])
def test_quantised_bases_are_refused(how, llama, tmp_path):
    root, _ = llama
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    if how == "config":
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes"}
        (base / "config.json").write_text(json.dumps(config))
    else:
        weights = load_file(base / "model.safetensors")
        integers = {key: (100 * w).to(torch.int8) if "q_proj" in key else w for key, w in weights.items()}
        save_file(integers, base / "model.safetensors")
    kind, sentence = refusal(tmp_path, base, {root / "adapter": 1.0})
    assert kind is BaseError
    assert f"base is quantised ({'bitsandbytes' if how == 'config' else 'I8'})" in sentence


def test_an_adapter_that_does_not_fit_is_refused(folders, adapters, tmp_path):
    mix = [(adapters[0], 1.0), (full("unet.conv_inn", 8, 4, 3, 3), 1.0)]
    kind, sentence = refusal(tmp_path, folders / "fp32", mix)
    assert kind is BaseMismatch
    assert (
        sentence == "adapter 2 does not fit fp32: 0 of 1 layers match; there is no unet.conv_inn in its files"
    )
    kind, sentence = refusal(tmp_path, folders / "fp32", [(full(LAYER, 16, 8), 1.0)])
    assert kind is BaseMismatch
    assert f"{LAYER} has weight (16, 16), the adapter's is (16, 8)" in sentence


def test_an_adapter_of_another_fine_tune_is_baked_with_a_warning(folders, adapters, tmp_path):
    weight = load_file(folders / "fp32" / "unet" / "diffusion_pytorch_model.safetensors")[
        f"{LAYER[5:]}.weight"
    ]
    moved = weight + 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for prediction, words in (
        ("v", "has the same shapes and other weights"),
        ("epsilon", "one predicts epsilon"),
    ):
        card = AdapterCard(base="elsewhere", fingerprint=Fingerprint.of({LAYER: moved}, prediction).to_json())
        mix = [(Adapter({LAYER: adapters[0][LAYER]}, card), 1.0)]
        kind, sentence = refusal(tmp_path, folders / "fp32", mix, strict_base=True)
        assert kind is BaseMismatch
        assert sentence.startswith("adapter 1 was trained on elsewhere")
        assert words in sentence
    same = AdapterCard(fingerprint=Fingerprint.of({LAYER: weight.half()}, "v").to_json())
    mmpeft.bake(
        folders / "fp32",
        [(Adapter({LAYER: adapters[0][LAYER]}, same), 1.0)],
        tmp_path / "a",
        strict_base=True,
    )
    other = AdapterCard(base="elsewhere", fingerprint=Fingerprint.of({LAYER: moved}, "v").to_json())
    with pytest.warns(
        UserWarning, match=r"trained on elsewhere; fp32 has the same shapes .*% apart; it will"
    ):
        mmpeft.bake(folders / "fp32", [(Adapter({LAYER: adapters[0][LAYER]}, other), 1.0)], tmp_path / "b")


def test_weights_that_cannot_be_baked_are_refused(folders, adapters, tmp_path):
    base, one = folders / "fp32", adapters[0]
    varying = Weight(schedule=Schedule.window(0.0, 0.5))
    for mix, words in (
        ([(one, varying)], "the weight of adapter 1 varies with time, place, sample or branch"),
        ([(one, "strong")], "the weight of adapter 1: must be a finite number"),
        ([(one, {"unet.nowhere": 1.0})], "'unet.nowhere' is no component, block or layer here"),
        ([(one, 0.0)], "there is nothing to bake"),
        ([], "there is nothing to bake"),
        (one, "a mix is a mapping of adapter paths to weights"),
        ([(3, 1.0)], "an adapter or the path of one is needed; got int"),
    ):
        kind, sentence = refusal(tmp_path, base, mix)
        assert kind is ConfigError
        assert words in sentence


def test_a_broken_adapter_file_is_refused(folders, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\x10")
    kind, sentence = refusal(tmp_path, folders / "fp32", {tmp_path / "broken.safetensors": 1.0})
    assert kind is FormatError
    assert "broken.safetensors is truncated" in sentence


@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_a_result_that_is_not_finite_is_refused(value, folders, tmp_path):
    kind, sentence = refusal(tmp_path, folders / "fp16", [(full(LAYER, 16, 16, value=value), 1.0)])
    assert kind is MethodError
    assert sentence.startswith(f"{LAYER} would hold numbers that are not finite in float16")


def test_a_method_that_is_no_change_of_weights_is_refused_by_name(folders, tmp_path):
    class Bottleneck(FullLayer):
        method = "bottleneck"

        def delta(self, weight=None):
            raise MethodError("a bottleneck adapter is a layer of its own, not a change of a weight")

    kind, sentence = refusal(
        tmp_path, folders / "fp32", [(Adapter({LAYER: Bottleneck(torch.ones(16, 16))}), 1.0)]
    )
    assert kind is MethodError
    assert (
        sentence
        == f"adapter 1: {LAYER}: a bottleneck adapter is a layer of its own, not a change of a weight"
    )


def test_places_that_would_lose_something_are_refused(folders, single_file, adapters, tmp_path):
    mix = [(adapters[0], 1.0)]
    base = shutil.copytree(folders / "fp32", tmp_path / "base")
    assert "lie in each other" in refusal(tmp_path, base, mix, "base")[1]
    assert "lie in each other" in refusal(tmp_path, base, mix, "base/baked")[1]
    assert "must be a folder, as the base is" in refusal(tmp_path, base, mix, "out.safetensors")[1]
    assert "must be a .safetensors file, as the base is" in refusal(tmp_path, single_file, mix)[1]
    mmpeft.bake(base, mix, tmp_path / "out")
    adapters[0].save(tmp_path / "out" / "adapter")
    sentence = refusal(tmp_path, base, {tmp_path / "out" / "adapter": 1.0})[1]
    assert "lies in" in sentence
    assert "which would be replaced; move it" in sentence


@pytest.mark.skipif(sys.platform == "win32", reason="sizes are limited by POSIX's resource limits")
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_disk_that_fills_up_leaves_nothing(kind, folders, single_file, adapters, tmp_path):
    import resource

    base, out = (folders / "fp32", "out") if kind == "folder" else (single_file, "out.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        error, sentence = refusal(tmp_path, base, [(adapters[0], 1.0)], out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error is BaseError
    assert sentence.startswith(f"cannot write {tmp_path / out}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_seen_before_anything_is_written(folders, adapters, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    error, sentence = refusal(tmp_path, folders / "fp32", [(adapters[0], 1.0)])
    assert error is BaseError
    assert "its disk has 0 MB left" in sentence


def test_an_earlier_bake_survives_one_that_fails(folders, adapters, tmp_path):
    mmpeft.bake(folders / "fp16", [(adapters[0], 1.0)], tmp_path / "out")
    refusal(tmp_path, folders / "fp16", [(full(LAYER, 16, 16, value=1e9), 1.0)])
    assert (tmp_path / "out" / LINEAGE).is_file()


def test_a_kohya_file_finds_its_layers_by_the_base_s_names(folders, single_file, adapters, tmp_path):
    mmpeft.export(adapters[0], tmp_path / "kohya.safetensors", format="kohya")
    mmpeft.bake(folders / "fp32", {tmp_path / "kohya.safetensors": 0.8}, tmp_path / "one")
    mmpeft.bake(folders / "fp32", [(adapters[0], 0.8)], tmp_path / "two")
    mmpeft.bake(single_file, {tmp_path / "kohya.safetensors": 0.8}, tmp_path / "three.safetensors")
    mmpeft.bake(single_file, [(adapters[0], 0.8)], tmp_path / "four.safetensors")
    for one, two in (
        ("one/unet/diffusion_pytorch_model.safetensors", "two/unet/diffusion_pytorch_model.safetensors"),
        ("three.safetensors", "four.safetensors"),
    ):
        assert (tmp_path / one).read_bytes() == (tmp_path / two).read_bytes()
