import json
import math

import pytest
import torch

from mmpeft.backbones.fingerprint import Fingerprint, compare
from mmpeft.errors import FormatError


def weights(seed=0, std=0.05):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"unet.a.to_q": (64, 48), "unet.b.conv1": (32, 16, 3, 3), "text_encoder.c.fc1": (96, 24)}
    return {name: std * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def changed(share, seed=1):
    """The same weights moved by a share of their own norm."""
    other = weights(seed)
    return {
        name: weight + share * weight.norm() * other[name] / other[name].norm()
        for name, weight in weights().items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_copies_in_half_precision_are_the_same_base(dtype):
    copy = Fingerprint.of({name: w.to(dtype) for name, w in weights().items()}, "v")
    match = compare(Fingerprint.of(weights(), "v"), copy)
    assert match.kind == "same"
    assert match.distance < 0.003


def test_a_fine_tune_is_told_with_its_distance():
    for share in (0.01, 0.1, 0.5):
        match = compare(Fingerprint.of(weights(), "v"), Fingerprint.of(changed(share), "v"))
        assert match.kind == "fine-tune"
        # 24 projections estimate the norm to within about a half
        assert 0.5 * share < match.distance < 1.6 * share


def test_unrelated_weights_are_far_away():
    match = compare(Fingerprint.of(weights(), "v"), Fingerprint.of(weights(5), "v"))
    assert match.kind == "fine-tune"
    assert match.distance > 0.7


def test_another_prediction_is_another_base():
    match = compare(Fingerprint.of(weights(), "v"), Fingerprint.of(weights(), "epsilon"))
    assert (match.kind, match.distance) == ("other", math.inf)
    assert match.reason == "one predicts v, the other epsilon"


def test_other_shapes_are_another_base():
    other = {**weights(), "unet.a.to_q": torch.zeros(64, 32)}
    match = compare(Fingerprint.of(weights(), "v"), Fingerprint.of(other, "v"))
    assert match.kind == "other"
    assert match.reason == "1 of 3 layers have other shapes, the first is unet.a.to_q: (64, 48) and (64, 32)"


def test_missing_layers_are_another_base_and_more_layers_are_not():
    few = {"unet.a.to_q": weights()["unet.a.to_q"]}
    assert compare(Fingerprint.of(few, "v"), Fingerprint.of(weights(), "v")).kind == "same"
    match = compare(Fingerprint.of(weights(), "v"), Fingerprint.of(few, "v"))
    assert match.reason == "2 of 3 layers are not there, the first is text_encoder.c.fc1"


def test_json_keeps_what_comparing_needs_and_is_small():
    fingerprint = Fingerprint.of(weights(), "v")
    text = json.dumps(fingerprint.to_json())
    assert len(text) < 200 * len(fingerprint.layers) + 50
    match = compare(fingerprint, Fingerprint.from_json(json.loads(text)))
    assert match.kind == "same"
    assert match.distance < 1e-5  # six digits


@pytest.mark.parametrize(
    "data", [{}, {"prediction": "v", "layers": {"a": 3}}, {"prediction": "v", "layers": []}]
)
def test_something_else_is_no_fingerprint(data):
    with pytest.raises(FormatError, match="this is no base fingerprint"):
        Fingerprint.from_json(data)
