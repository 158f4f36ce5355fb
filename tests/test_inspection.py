import json
import math

import pytest
import safetensors.torch
import torch

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.backbones.fingerprint import Fingerprint
from mmpeft.errors import AdapterError
from mmpeft.inspection import inspect
from mmpeft.methods.dora import DoraLayer
from mmpeft.methods.lora import LoraLayer


def lora(seed=0, rank=2, alpha=4.0, size=0.1, shape=(6, 8)):
    draw = torch.Generator().manual_seed(seed)
    return LoraLayer(
        lora_A=torch.randn(rank, shape[1], generator=draw),
        lora_B=size * torch.randn(shape[0], rank, generator=draw),
        alpha=alpha,
    )


@pytest.fixture
def folder(tmp_path):
    """Four layers of a UNet at rank 2 and one of a text encoder at rank 3, on a base that the card knows."""
    layers = {f"unet.mid_block.attentions.{n}.to_q": lora(n) for n in range(4)}
    layers["text_encoder.text_model.encoder.layers.0.mlp.fc1"] = lora(9, rank=3, alpha=3.0)
    weights = {name: torch.full((6, 8), 0.5) for name in layers}
    card = AdapterCard(
        base="tiny", trigger="sks", steps=40, seed=7, fingerprint=Fingerprint.of(weights, "v").to_json()
    )
    return Adapter(layers, card).save(tmp_path / "adapter")


def test_the_report_says_what_was_saved(folder):
    report = inspect(folder)
    assert report.format == "native folder"
    assert report.components == {"text_encoder": 1, "unet": 4}
    assert report.file_bytes == (folder / report.file).stat().st_size
    layer = next(layer for layer in report.layers if layer.name == "unet.mid_block.attentions.2.to_q")
    assert (layer.method, layer.rank, layer.alpha, layer.scale, layer.shape) == ("lora", 2, 4.0, 2.0, (6, 8))
    assert layer.entries == 2 * (6 + 8)
    assert report.health == ()


def test_norms_are_those_of_the_dense_changes(folder):
    report = inspect(folder)
    dense = {layer.name: layer.norm for layer in report.layers}
    for number in range(4):
        expected = float(lora(number).dense().norm())
        # float64 sums of the factors against a float32 product
        assert dense[f"unet.mid_block.attentions.{number}.to_q"] == pytest.approx(expected, rel=1e-5)
    assert report.total_norm == pytest.approx(math.hypot(*dense.values()))
    layer = report.layers[0]
    assert layer.relative == pytest.approx(
        layer.norm / math.sqrt(48 * 0.25), rel=1e-5
    )  # six digits on the card


def test_the_text_names_base_trigger_ranks_and_the_largest_layer(folder):
    report = inspect(folder)
    text = report.text()
    largest = max(report.layers, key=lambda layer: layer.norm)
    assert "rank: 2 (4 layers), 3 (1 layers)" in text
    assert "base: tiny" in text
    assert "trigger: sks" in text
    assert "5 layers of a base that predicts v" in text
    assert f"{largest.name}" in text
    assert text.endswith("health: nothing looks wrong")


def test_the_report_is_json(folder):
    read = json.loads(json.dumps(inspect(folder).as_dict()))
    assert len(read["layers"]) == 5
    assert read["card"]["trigger"] == "sks"
    assert "lora_adapter_metadata" in read["metadata"]
    assert read["fingerprint"] == {"prediction": "v", "layers": 5}


def test_the_weights_of_a_folder_can_be_looked_at_alone(folder, tmp_path):
    alone = tmp_path / "style.safetensors"
    alone.write_bytes((folder / "pytorch_lora_weights.safetensors").read_bytes())
    report = inspect(alone)
    assert report.format == "diffusers"
    assert "fingerprint: none" in report.text()
    assert inspect(folder / "peft" / "unet").format == "PEFT"


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        (0.0, "attentions.3.to_q of 5 layers change nothing"),
        (50.0, "larger than the base's weight in unet.mid_block.attentions.3.to_q"),
        (10.0, "more than 20 times above the median layer of unet: unet.mid_block.attentions.3.to_q"),
        (1e-4, "more than 20 times below the median layer of unet: unet.mid_block.attentions.3.to_q"),
    ],
)
def test_a_layer_that_is_not_like_the_others_is_named(folder, odd, sentence):
    healthy = mmpeft.load_adapter(folder)
    layers = {**healthy, "unet.mid_block.attentions.3.to_q": lora(3, size=odd)}
    report = inspect(Adapter(layers, healthy.card).save(folder))
    assert any(sentence in line for line in report.health), report.health
    assert "look at this: " in report.text()


def test_an_adapter_that_does_nothing_is_told(tmp_path):
    fresh = Adapter({f"unet.mid_block.attentions.{n}.to_q": lora(n, size=0.0) for n in range(3)})
    assert "the adapter does nothing" in inspect(fresh.save(tmp_path / "a")).health[0]


def test_a_change_that_depends_on_the_base_has_no_norm(tmp_path):
    plain = lora()
    layer = DoraLayer(plain.lora_A, plain.lora_B, plain.alpha, lora_magnitude_vector=torch.ones(6))
    report = inspect(Adapter({"unet.mid_block.attentions.0.to_q": layer}).save(tmp_path / "a"))
    assert report.layers[0].method == "dora"
    assert report.layers[0].norm is None
    assert report.total_norm is None
    assert "depends on the base's weights" in report.text()


def test_numbers_that_are_not_finite_are_told_with_their_layers(folder):
    file = folder / "pytorch_lora_weights.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    tensors["unet.mid_block.attentions.1.to_q.lora_B.weight"][0, 0] = math.nan
    safetensors.torch.save_file(tensors, file, metadata)
    report = inspect(folder)
    sentence = (
        "not finite, up to 8% of a tensor, in unet.mid_block.attentions.1.to_q: the adapter cannot be loaded"
    )
    assert any(sentence in line for line in report.health), report.health
    broken = {layer.name: layer.broken for layer in report.layers if layer.broken}
    assert broken == {"unet.mid_block.attentions.1.to_q": {"lora_B": pytest.approx(1 / 12)}}
    assert report.total_norm is None
    json.dumps(report.as_dict())


def kohya_file(folder, stem="lora_unet_mid_block_attentions_0_proj_in", **metadata):
    tensors = {
        f"{stem}.lora_down.weight": torch.ones(2, 8),
        f"{stem}.lora_up.weight": torch.ones(6, 2),
        f"{stem}.alpha": torch.tensor(1.0),
    }
    safetensors.torch.save_file(tensors, folder / "x.safetensors", metadata)
    return folder / "x.safetensors"


def test_what_kohya_says_of_a_file_is_shown(tmp_path):
    said = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "2", "ss_tag_frequency": "{}"}
    report = inspect(kohya_file(tmp_path, **said))
    assert (report.format, report.layers[0].alpha, report.layers[0].scale) == ("kohya", 1.0, 0.5)
    assert "ss_base_model_version: sdxl_base_v1-0" in report.text()
    assert "more in the header: ss_tag_frequency" in report.text()
    assert report.as_dict()["metadata"] == said


def test_names_that_only_the_base_can_tell_stay_as_they_are(tmp_path):
    report = inspect(kohya_file(tmp_path, stem="lora_unet_my_own_block"))
    assert [layer.name for layer in report.layers] == ["unet.my_own_block"]
    assert report.layers[0].norm == pytest.approx(0.5 * 2 * math.sqrt(48))


def test_other_methods_of_lycoris_are_told(tmp_path):
    stem = "lycoris_down_blocks_0_resnets_0_conv1"
    parts = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}
    tensors = {f"{stem}.{part}": torch.ones(shape) for part, shape in parts.items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert (report.format, report.layers[0].method, report.layers[0].rank) == ("LyCORIS", "loha", 2)
    assert report.layers[0].norm == pytest.approx(4 * math.sqrt(48))
    saved = mmpeft.load_adapter(tmp_path / "x.safetensors").save(tmp_path / "a")
    assert inspect(saved).format == "native folder"


def test_a_change_too_large_to_build_is_not_built(tmp_path):
    side = 2**15
    tensors = {
        "lora_unet_conv_in.hada_w1_a": torch.ones(side, 1),
        "lora_unet_conv_in.hada_w1_b": torch.ones(1, side),
        "lora_unet_conv_in.hada_w2_a": torch.ones(side, 1),
        "lora_unet_conv_in.hada_w2_b": torch.ones(1, side),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    assert inspect(tmp_path / "x.safetensors").layers[0].norm is None


def test_with_its_base_the_norms_of_every_method_are_known(tmp_path, tiny_sd_folder):
    from diffusers import StableDiffusionPipeline

    base = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    name = "mid_block.attentions.0.proj_in"
    weight = base.unet.get_submodule(name).weight.detach()
    zero = torch.zeros(weight.shape[0], 2, 1, 1)
    norm = torch.linalg.vector_norm(weight.flatten(1), dim=1).reshape(1, -1, 1, 1)
    layer = DoraLayer(torch.ones(2, *weight.shape[1:]), zero, 2.0, lora_magnitude_vector=1.5 * norm)
    folder = Adapter({f"unet.{name}": layer}).save(tmp_path / "a")
    assert inspect(folder).layers[0].norm is None
    found = inspect(folder, base=base).layers[0]
    assert found.norm == pytest.approx(0.5 * float(weight.norm()), rel=1e-5)
    assert found.relative == pytest.approx(0.5, rel=1e-5)


def test_what_is_no_adapter_is_told(tmp_path):
    with pytest.raises(AdapterError, match="there is no adapter at"):
        inspect(tmp_path / "nothing")
