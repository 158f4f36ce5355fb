import hashlib
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mmpeft.adapter_file as adapter_file
from mmpeft.adapter import Adapter, load_adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.delta import Dense
from mmpeft.errors import AdapterError, BaseMismatch, FormatError, MethodError
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.dora import DoraLayer
from mmpeft.methods.full import FullLayer
from mmpeft.methods.loha import LohaLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.methods.oft import InputOftLayer
from mmpeft.verification import predict, verify

KINDS = {
    "alpha is twice the rank": ("lora", {"rank": 4, "alpha": 8.0}),
    "ranks and alphas by layer": (
        "lora",
        {
            "rank": 4,
            "alpha": 3.0,
            "rank_pattern": {"*attn1.to_q": 2, "*.fc1": 6},
            "alpha_pattern": {"*.conv1": 5.5},
        },
    ),
    "rsLoRA": ("lora", {"rank": 4, "alpha": 2.0, "rslora": True, "rank_pattern": {"*.to_k": 2}}),
    "DoRA": ("dora", {"rank": 4, "alpha": 8.0, "rank_pattern": {"*.to_k": 2}}),
}
PROMPTS = ["a red cat", "a dog in ink"]


@pytest.fixture
def open_base(tiny_sd_folder):
    return lambda: StableDiffusionPipeline.from_pretrained(tiny_sd_folder)


@pytest.fixture
def adapter():
    generator = torch.Generator().manual_seed(0)
    return Adapter(
        {
            "unet.mid.to_q": LoraLayer(
                torch.randn(2, 4, generator=generator), torch.randn(3, 2, generator=generator), 2.0
            ),
            "unet.mid.conv": LoraLayer(
                torch.randn(2, 4, 3, 3, generator=generator), torch.randn(3, 2, 1, 1), 1.5
            ),
        },
        AdapterCard(
            base="pocket",
            trigger="ink style",
            seed=3,
            steps=10,
            metrics={"loss": 0.5},
            versions={"torch": "2"},
        ),
    )


def same(one, other):
    return one.layers == other.layers and all(
        type(layer) is type(other[name])
        and (layer.alpha, layer.rslora) == (other[name].alpha, other[name].rslora)
        and all(
            torch.equal(t, other[name].tensors[k]) and t.dtype == other[name].tensors[k].dtype
            for k, t in layer.tensors.items()
        )
        for name, layer in one.items()
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT on transformers 5
@pytest.mark.parametrize("kind", KINDS)
def test_plain_diffusers_and_plain_peft_compute_what_was_trained(kind, open_base, attach_randomly, tmp_path):
    from peft import PeftModel

    method, method_settings = KINDS[kind]
    trained = open_base()
    adapter = attach_randomly(trained, method, **method_settings)
    expected = predict(trained, PROMPTS)
    adapter.save(tmp_path / "a")

    plain = open_base()
    base = predict(plain, PROMPTS)
    plain.load_lora_weights(str(tmp_path / "a"))
    # the same float32 operations on the same numbers, rsLoRA's and DoRA's scales computed anew
    torch.testing.assert_close(predict(plain, PROMPTS), expected, rtol=1e-5, atol=1e-6)
    assert (expected - base).norm() > 0.1 * base.norm()

    peft = open_base()
    peft.unet = PeftModel.from_pretrained(peft.unet, tmp_path / "a/peft/unet")
    peft.text_encoder = PeftModel.from_pretrained(peft.text_encoder, tmp_path / "a/peft/text_encoder")
    torch.testing.assert_close(predict(peft, PROMPTS), expected, rtol=1e-5, atol=1e-6)

    assert same(load_adapter(tmp_path / "a"), adapter)
    whole = {
        f"unet.{n}": layer for n, layer in load_adapter(tmp_path / "a/peft/unet").component("unet").items()
    }
    text = load_adapter(tmp_path / "a/peft/text_encoder")
    assert same(Adapter({**whole, **text}), adapter)


def test_verification_passes_what_is_right_and_leaves_the_pipeline_plain(
    open_base, attach_randomly, tmp_path
):
    trained, plain = open_base(), open_base()
    folder = attach_randomly(trained, alpha=8.0, rank=4).save(tmp_path / "a")
    before = predict(plain, PROMPTS)
    report = verify(folder, plain, trained, prompts=PROMPTS)
    assert report.is_ok
    assert report.difference < 1e-4 * report.effect
    assert report.sentence.startswith("verified")
    assert torch.equal(predict(plain, PROMPTS), before)


@pytest.mark.parametrize("fault", ["alpha", "text encoder", "nothing"])
def test_verification_finds_what_is_wrong(fault, open_base, attach_randomly, tmp_path):
    trained, plain = open_base(), open_base()
    folder = attach_randomly(trained, alpha=8.0, rank=4).save(tmp_path / "a")
    file = folder / adapter_file.WEIGHTS
    tensors = load_file(file)
    metadata = adapter_file.read_tensors(file)[1]
    if fault == "alpha":
        del metadata["lora_adapter_metadata"]  # diffusers then takes alpha = rank
    elif fault == "text encoder":
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith("unet.")}
    else:
        trained, tensors = open_base(), {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    save_file(tensors, file, metadata=metadata)
    report = verify(folder, plain, lambda prompts, seed: predict(trained, prompts, seed), prompts=PROMPTS)
    assert not report.is_ok
    assert report.sentence.startswith("not verified")
    assert ("learned nothing" in report.sentence) == (fault == "nothing")


def test_the_bytes_depend_on_the_adapter_alone(adapter, tmp_path):
    def digests(folder):
        return {
            str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in folder.rglob("*.*")
            if f.is_file()
        }

    torch.save(
        {name: dict(layer.tensors) | {"alpha": layer.alpha} for name, layer in adapter.items()},
        tmp_path / "t.pt",
    )
    script = (
        "import torch, sys; from mmpeft.adapter import *; from mmpeft.methods.lora import LoraLayer\n"
        f"parts = torch.load({str(tmp_path / 't.pt')!r})\n"
        "layers = {n: LoraLayer(**p) for n, p in reversed(parts.items())}\n"
        "card = AdapterCard(base='pocket', trigger='ink style', seed=3, steps=10, metrics={'loss': 0.5},"
        " versions={'torch': '2'})\n"
        f"Adapter(layers, card).save({str(tmp_path / 'other')!r})"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    )
    first = adapter.save(tmp_path / "first")
    assert digests(first) == digests(tmp_path / "other")
    assert set(digests(first)) == {
        "pytorch_lora_weights.safetensors",
        "adapter.json",
        "README.md",
        "peft/unet/adapter_config.json",
        "peft/unet/adapter_model.safetensors",
    }


def test_the_safetensors_library_reads_what_is_written(adapter, tmp_path):
    adapter.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / adapter_file.WEIGHTS)
    assert torch.equal(tensors["unet.mid.conv.lora_A.weight"], adapter["unet.mid.conv"].lora_A)


def test_the_card_comes_back_and_the_model_card_tells_it(adapter, tmp_path):
    folder = adapter.save(tmp_path / "a", files={"preview/0.png": b"picture"})
    assert load_adapter(folder).card == adapter.card
    assert (folder / "preview/0.png").read_bytes() == b"picture"
    page = (folder / "README.md").read_text()
    for part in (
        "library_name: diffusers",
        'instance_prompt: "ink style"',
        "load_lora_weights",
        "preview/0.png",
        "| loss | 0.5 |",
    ):
        assert part in page
    assert "base_model" not in page  # "pocket" is no hub name
    assert load_adapter(folder / "peft/unet").card == adapter.card


def test_saving_replaces_an_adapter_but_nothing_else(adapter, tmp_path):
    folder = adapter.save(tmp_path / "a", files={"old.png": b""})
    adapter.save(folder)
    assert not (folder / "old.png").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"holds something that is no adapter"):
        adapter.save(tmp_path / "b")
    assert [f.name for f in (tmp_path / "b").iterdir()] == ["thesis.txt"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b"]


def test_what_somebody_put_beside_an_adapter_is_not_lost(adapter, tmp_path):
    folder = adapter.save(tmp_path / "a")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        AdapterError, match=r"holds notes.txt beside an adapter, which replacing .* would lose"
    ):
        adapter.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    adapter.save(folder, files={"notes.txt": b"newer"})
    assert (folder / "notes.txt").read_bytes() == b"newer"


def test_a_save_that_fails_leaves_the_old_adapter(adapter, tmp_path, monkeypatch):
    import errno
    import os

    folder = adapter.save(tmp_path / "a")
    before = (folder / adapter_file.WEIGHTS).read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterError, match=r"cannot write the adapter to .*No space left"):
        Adapter({"unet.x": LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)}).save(folder)
    assert (folder / adapter_file.WEIGHTS).read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_saved_is_refused(adapter, tmp_path):
    class Strange(LayerAdapter):
        method, tensors, shape = "strange", {"x": torch.ones(1)}, (1, 1)

        def delta(self, weight=None):
            return Dense(torch.ones(1, 1))

    lora = adapter["unet.mid.to_q"]
    nan = LoraLayer(lora.lora_A * float("nan"), lora.lora_B, 1.0)
    dora = DoraLayer(lora.lora_A, lora.lora_B, 1.0, lora_magnitude_vector=torch.ones(3))
    for layers, error, words in (
        ({}, AdapterError, "empty"),
        ({"unet.x": nan}, FormatError, r"unet.x has numbers that are not finite in lora_A \(100 %"),
        ({"unet.x": Strange()}, MethodError, r"strange .*has no form in LyCORIS's files"),
        ({"unet.a_b": dora, "unet.a.b": lora}, MethodError, "would both be called lora_unet_a_b"),
    ):
        with pytest.raises(error, match=words):
            Adapter(layers).save(tmp_path / "x")
    with pytest.raises(AdapterError, match=r"outside"):
        adapter.save(tmp_path / "x", files={"../y": b""})
    with pytest.raises(AdapterError, match=r"README.md is a file of the adapter itself"):
        adapter.save(tmp_path / "x", files={"README.md": b""})
    assert list(tmp_path.iterdir()) == []


layer_strategy = st.tuples(
    st.integers(1, 4),
    st.sampled_from([(3, 2), (2, 4, 3, 3), (4, 2, 1, 1)]),
    st.floats(0.01, 100),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)


@settings(max_examples=25, deadline=None)
@given(
    parts=st.dictionaries(
        st.sampled_from(["a.b.1.c", "a.b.11.c", "c", "x.c", "to_q"]), layer_strategy, min_size=1
    ),
    component=st.sampled_from(["unet", "text_encoder", "transformer"]),
    rslora=st.booleans(),
    is_dora=st.booleans(),
)
def test_there_and_back_is_identity(parts, component, rslora, is_dora, tmp_path_factory):
    generator = torch.Generator().manual_seed(len(parts))
    layers = {}
    for name, (rank, shape, alpha, _, dtype) in parts.items():
        ones = (1,) * (len(shape) - 2)
        A = torch.randn(rank, *shape[1:], generator=generator).to(dtype)
        B = torch.randn(shape[0], rank, *ones, generator=generator).to(dtype)
        magnitude = torch.rand((1, shape[0], *ones) if ones else (shape[0],), generator=generator).to(dtype)
        more = {"lora_magnitude_vector": magnitude} if is_dora else {}
        layers[f"{component}.{name}"] = (DoraLayer if is_dora else LoraLayer)(A, B, alpha, rslora, **more)
    folder = tmp_path_factory.mktemp("there") / "a"
    assert same(load_adapter(Adapter(layers).save(folder)), Adapter(layers))
    shutil.rmtree(folder.parent)


def test_layers_with_and_without_rslora_keep_their_effect(tmp_path):
    A, B = torch.ones(4, 2), torch.ones(3, 4)
    adapter = Adapter({"unet.a": LoraLayer(A, B, 2.0, rslora=True), "unet.b": LoraLayer(A, B, 2.0)})
    loaded = load_adapter(adapter.save(tmp_path / "a"))
    for name, layer in adapter.items():
        torch.testing.assert_close(loaded[name].dense(), layer.dense())


def test_a_broken_card_is_told(adapter, tmp_path):
    folder = adapter.save(tmp_path / "a")
    (folder / "adapter.json").write_text("{")
    with pytest.raises(FormatError, match=r"adapter.json is no JSON"):
        load_adapter(folder)


def test_a_base_that_does_not_fit_is_told(open_base, attach_randomly, adapter, tmp_path):
    base = open_base()
    with pytest.raises(
        BaseMismatch,
        match=r"_weights.safetensors was trained on pocket .* 0 of 2 layers match; there is no unet.mid.conv",
    ):
        load_adapter(adapter.save(tmp_path / "a"), base=base)
    fitting = attach_randomly(base, rank=2).save(tmp_path / "b")
    fresh = open_base()
    assert load_adapter(fitting, base=fresh).components == ("text_encoder", "unet")
    with pytest.raises(
        BaseMismatch, match=r"layers match; there is no text_encoder.*text_encoder 0 of 4, unet 48 of 48"
    ):
        load_adapter(fitting, base=fresh.unet)


def test_a_folder_can_be_the_base(tiny_sd_folder, adapter, tmp_path):
    folder = adapter.save(tmp_path / "a")
    with pytest.raises(BaseMismatch, match=r"unet .UNet2DConditionModel."):
        load_adapter(folder, base=tiny_sd_folder)


def test_what_diffusers_cannot_load_is_saved_as_lycoris_and_comes_back(tmp_path):
    layers = {
        "unet.my_own.block.conv_x": FullLayer(torch.randn(4, 3, 3, 3)),
        "unet.my_own.block.conv_x.bias": FullLayer(torch.randn(4)),
        "unet.mid_block.norm": FullLayer(torch.randn(4)),
        "unet.a.to_q": LoraLayer(torch.randn(2, 3), torch.randn(4, 2), 5.0),
        "text_encoder.b.q": DoraLayer(
            torch.randn(2, 3), torch.randn(4, 2), 1.0, lora_magnitude_vector=torch.rand(4)
        ),
        "language_model.model.layers.0.mlp.up_proj": FullLayer(torch.randn(4, 3)),
    }
    adapter = Adapter(layers, AdapterCard(base="pocket", trigger="ink"))
    folder = adapter.save(tmp_path / "a")
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "adapter.json",
        "lycoris.safetensors",
    ]
    page = (folder / "README.md").read_text()
    assert "load_lora_weights" not in page
    assert "mmpeft convert" in page
    back = load_adapter(folder)
    assert back.digest == adapter.digest
    assert back.card == adapter.card


def test_peft_folders_stand_beside_where_peft_has_the_method(tmp_path):
    loha = LohaLayer(torch.randn(4, 2), torch.randn(2, 3), torch.randn(4, 2), torch.randn(2, 3), alpha=3.0)
    turned = InputOftLayer(torch.randn(1, 3), 0)
    folder = Adapter({"language_model.up": loha}).save(tmp_path / "loha")
    assert (folder / "lycoris.safetensors").is_file()
    assert load_adapter(folder / "peft/language_model").digest == load_adapter(folder).digest
    adapter = Adapter({"language_model.up": turned})
    folder = adapter.save(tmp_path / "oft")  # which has no other form
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "adapter.json", "peft"]
    assert load_adapter(folder).digest == adapter.digest


def test_a_base_gives_its_weights_to_the_layers_that_need_them(open_base, attach_randomly, tmp_path):
    trained = open_base()
    folder = attach_randomly(trained, "dora", rank=2).save(tmp_path / "a")
    base = open_base()
    bound, free = load_adapter(folder, base=base), load_adapter(folder)
    name = next(name for name in bound if name.endswith("conv1"))
    weight = base.unet.get_submodule(name.removeprefix("unet.")).weight
    torch.testing.assert_close(bound[name].dense(), free[name].dense(weight))
    assert bound[name].base_weight.data_ptr() == weight.data_ptr()  # a reference, not a copy
    with pytest.raises(AdapterError, match="load the adapter with its base"):
        free[name].dense()


def test_changed_norms_and_biases_must_fit_the_base(open_base, tmp_path):
    base = open_base()
    norm = "unet.mid_block.resnets.0.norm1"
    right = {norm: FullLayer(torch.ones(16)), f"{norm}.bias": FullLayer(torch.ones(16))}
    assert load_adapter(Adapter(right).save(tmp_path / "a"), base=base).layers == tuple(right)
    wrong = Adapter({**right, norm: FullLayer(torch.ones(3))}).save(tmp_path / "b")
    with pytest.raises(
        BaseMismatch, match=rf"1 of 2 layers match; {norm} has weight \(16,\), the adapter's is \(3,\)"
    ):
        load_adapter(wrong, base=base)
