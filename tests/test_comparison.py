"""How far apart adapters are, against the dense definition."""

import copy
import json
import math

import pytest
import torch

from mmpeft.adapter import Adapter
from mmpeft.comparison import compare
from mmpeft.errors import AdapterError, BaseMismatch
from mmpeft.methods.full import FullLayer
from mmpeft.methods.lora import LoraLayer

TO_Q, CONV = "unet.mid_block.attentions.0.proj_in", "unet.down_blocks.0.resnets.0.conv1"
SHAPES = {TO_Q: (12, 10), CONV: (6, 4, 3, 3)}


def make(seed, rank=2, layers=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (out, *rest) in layers.items():
        A = torch.randn(rank, *rest, generator=generator)
        B = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator)
        made[name] = LoraLayer(A, B, 3.0)
    return Adapter(made)


def test_distance_and_cosine_are_those_of_the_dense_changes():
    a, b = make(1, rank=2), make(2, rank=3)
    found = compare(a, b)
    dense = [torch.cat([adapter[n].dense().double().flatten() for n in SHAPES]) for adapter in (a, b)]
    assert found.distance == pytest.approx(float((dense[0] - dense[1]).norm() / dense[0].norm()))
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(*dense, dim=0)))
    for name in SHAPES:
        x, y = a[name].dense().double(), b[name].dense().double()
        assert found.layers[name].distance == pytest.approx(float((x - y).norm() / x.norm()))
        assert found.layers[name].norms == pytest.approx((float(x.norm()), float(y.norm())))


def test_one_change_in_other_factors_or_in_full_is_no_distance():
    a = make(1)
    skewed = Adapter({n: LoraLayer(l.lora_A * 4, l.lora_B / 8, 2 * l.alpha) for n, l in a.items()})
    full = Adapter({name: FullLayer(layer.dense()) for name, layer in a.items()})
    for other in (copy.deepcopy(a), skewed, full):
        found = compare(a, other)
        # float32 products of two terms
        assert found.distance < 1e-6
        assert found.cosine == pytest.approx(1)
        assert "they do the same" in found.text()


def test_what_only_one_has_counts_as_a_change_of_nothing_in_the_other():
    a, b = make(1), make(1, layers={TO_Q: (12, 10)})
    b = Adapter({TO_Q: a[TO_Q], "unet.conv_out": b[TO_Q]})
    found = compare(a, b)
    assert found.only == {"adapter 1": (CONV,), "adapter 2": ("unet.conv_out",)}
    assert set(found.layers) == {TO_Q}
    apart = math.hypot(a[CONV].delta().norm(), b["unet.conv_out"].delta().norm())
    whole = math.hypot(a[CONV].delta().norm(), a[TO_Q].delta().norm())
    assert found.distance == pytest.approx(apart / whole)
    assert f"only in adapter 1: {CONV}" in found.text()


def test_a_change_of_nothing_is_infinitely_far_from_one_of_something_and_json_still_stands():
    nothing = Adapter({TO_Q: LoraLayer(torch.zeros(1, 10), torch.zeros(12, 1), 1.0)})
    found = compare(nothing, make(1, layers={TO_Q: (12, 10)}))
    assert found.distance == found.layers[TO_Q].distance == math.inf
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["distance"] is None
    assert compare(nothing, nothing).distance == 0.0


def test_the_text_shows_the_layers_that_differ_most_first():
    a = make(1)
    b = Adapter({TO_Q: LoraLayer(a[TO_Q].lora_A, a[TO_Q].lora_B * 1.5, 3.0), CONV: make(2)[CONV]})
    lines = compare(a, b).text().splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("unet.")]
    assert shown == [CONV, TO_Q]


def test_a_method_that_depends_on_the_base_is_compared_with_it(tiny_sd_folder, attach_randomly):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    dora = attach_randomly(copy.deepcopy(pipeline), "dora", rank=2)
    with pytest.raises(AdapterError, match=r"adapter 1: .* depends on the base's weight"):
        compare(dora, dora)
    lora = attach_randomly(copy.deepcopy(pipeline), "lora", rank=2)
    # float32 sums of the parts in another order
    assert compare(dora, dora, base=pipeline).distance < 1e-6
    assert 0 < compare(dora, lora, base=pipeline).distance < math.inf


def test_adapters_of_other_bases_are_refused():
    with pytest.raises(BaseMismatch, match="belong to different bases"):
        compare(make(1), make(1, layers={TO_Q: (12, 11)}))
