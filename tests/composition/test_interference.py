"""Interference on adapters whose relation is known, and against the dense definitions."""

import json
import math

import pytest
import torch

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.errors import BaseMismatch, ConfigError, FormatError
from mmpeft.methods.full import FullLayer
from mmpeft.methods.lora import LoraLayer

TO_Q = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
BIAS = "unet.down_blocks.0.resnets.0.norm1.bias"
SHAPES = {TO_Q: (12, 10), CONV: (6, 4, 3, 3)}


def lora(A, B, alpha=None):
    return LoraLayer(A, B, float(A.shape[0] if alpha is None else alpha))


def make(seed, rank=2, layers=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (out, *rest) in layers.items():
        A = torch.randn(rank, *rest, generator=generator)
        made[name] = lora(A, torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator))
    return Adapter(made)


def scaled(adapter, factor):
    return Adapter({name: lora(l.lora_A, l.lora_B * factor) for name, l in adapter.items()})


def test_an_adapter_meets_itself_and_its_opposite():
    a = make(1)
    same = mmpeft.interference([a, scaled(a, 3.0)])
    for meeting in same.meetings:
        assert meeting.cosine == pytest.approx(1)
        assert meeting.sign_conflict == pytest.approx(0, abs=1e-6)
        assert meeting.output_overlap == pytest.approx(1)
        assert meeting.input_overlap == pytest.approx(1)
        assert meeting.relative_norm == pytest.approx(3)
    opposite = mmpeft.interference([a, scaled(a, -1.0)])
    for meeting in opposite.meetings:
        assert meeting.cosine == pytest.approx(-1)
        assert meeting.sign_conflict == pytest.approx(1)
        assert meeting.output_overlap == pytest.approx(1)


def test_adapters_that_read_and_write_other_things_do_not_meet():
    eye = torch.eye(10)
    a = Adapter({TO_Q: lora(eye[:2], torch.eye(12)[:, :2])})
    b = Adapter({TO_Q: lora(eye[2:5], torch.eye(12)[:, :3])})
    (meeting,) = mmpeft.interference([a, b]).meetings
    assert (meeting.cosine, meeting.sign_conflict) == (0.0, 0.0)
    assert meeting.input_overlap == pytest.approx(0, abs=1e-12)
    assert meeting.output_overlap == pytest.approx(1)
    # the mean squared cosine of random spaces of 2 and 3 dimensions in n is 3/n
    assert (meeting.output_chance, meeting.input_chance) == (3 / 12, 3 / 10)


def test_the_numbers_are_those_of_the_dense_changes():
    a, b = make(1, rank=2), make(2, rank=3)
    for meeting in mmpeft.interference([a, b]).meetings:
        x, y = (adapter[meeting.layer].dense().flatten(1).double() for adapter in (a, b))
        assert meeting.norms == pytest.approx((float(x.norm()), float(y.norm())))
        assert meeting.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-6)
        product = x * y
        conflict = float(-product[product < 0].sum() / product.abs().sum())
        assert meeting.sign_conflict == pytest.approx(conflict, rel=1e-5)
        for side, overlap in ((x, meeting.output_overlap), (x.T, meeting.input_overlap)):
            other = y if side is x else y.T
            first, second = torch.linalg.svd(side)[0][:, :2], torch.linalg.svd(other)[0][:, :3]
            expected = float(torch.linalg.svdvals(first.T @ second).square().mean())
            assert overlap == pytest.approx(expected, rel=1e-5)


def test_unrelated_adapters_have_what_chance_gives():
    layers = {f"unet.up_blocks.0.resnets.{n}.time_emb_proj": (40, 30) for n in range(60)}
    found = mmpeft.interference([make(1, 4, layers), make(2, 6, layers)])
    overall = found.overall(found.pairs[0])
    # means of 60 layers, each of 4 angles: three standard errors
    assert overall.output_overlap == pytest.approx(6 / 40, abs=0.03)
    assert overall.input_overlap == pytest.approx(6 / 30, abs=0.03)
    assert (overall.output_chance, overall.input_chance) == pytest.approx((6 / 40, 6 / 30))
    assert overall.sign_conflict == pytest.approx(0.5, abs=0.03)
    assert overall.cosine == pytest.approx(0, abs=0.05)


def test_sign_conflict_does_not_depend_on_how_strong_an_adapter_is():
    a, b = make(1), make(2)
    strong = mmpeft.interference([a, scaled(b, 50.0)])
    for one, other in zip(mmpeft.interference([a, b]).meetings, strong.meetings, strict=True):
        assert one.sign_conflict == pytest.approx(other.sign_conflict, rel=1e-5)


def test_all_layers_together_are_weighted_by_energy():
    a, b = make(1), make(2)
    b = Adapter({**b, CONV: lora(b[CONV].lora_A, b[CONV].lora_B * 1e-3)})
    found = mmpeft.interference([a, b])
    overall = found.overall(("adapter 1", "adapter 2"))
    inners = sum(m.cosine * m.energy for m in found.meetings)
    assert overall.cosine == pytest.approx(inners / sum(m.energy for m in found.meetings))
    to_q = next(m for m in found.meetings if m.layer == TO_Q)
    assert overall.sign_conflict == pytest.approx(to_q.sign_conflict, abs=1e-2)


def test_of_more_than_two_adapters_every_pair_is_measured():
    a, b, c = make(1), make(2), make(3, layers={TO_Q: (12, 10), "unet.conv_out": (3, 5)})
    found = mmpeft.interference([a, b, c])
    assert found.pairs == (
        ("adapter 1", "adapter 2"), ("adapter 1", "adapter 3"), ("adapter 2", "adapter 3"),
    )  # fmt: skip
    assert [m.layer for m in found.of(found.pairs[0])] == [CONV, TO_Q]
    assert [m.layer for m in found.of(found.pairs[1])] == [TO_Q]
    assert found.alone == {"adapter 1": 0, "adapter 2": 0, "adapter 3": 1}


def test_a_change_that_is_not_low_rank_has_the_spaces_of_nearly_all_its_energy():
    a = make(1)
    noise = torch.randn(12, 10, generator=torch.Generator().manual_seed(5))
    whole = a[TO_Q].dense()
    full = Adapter({TO_Q: FullLayer(whole + 0.002 * whole.norm() * noise / math.sqrt(120))})
    (meeting,) = mmpeft.interference([a, full]).meetings
    assert meeting.output_overlap > 0.99
    assert meeting.output_chance == 2 / 12


def test_vectors_and_layers_that_change_nothing_have_their_place():
    nothing = lora(torch.zeros(1, 10), torch.zeros(12, 1))
    a = Adapter({BIAS: FullLayer(torch.tensor([1.0, 2.0, 2.0])), TO_Q: nothing})
    b = Adapter({BIAS: FullLayer(torch.tensor([2.0, -1.0, 2.0])), TO_Q: make(1)[TO_Q]})
    found = mmpeft.interference([a, b])
    bias, to_q = found.meetings
    assert bias.cosine == pytest.approx(4 / 9)
    assert bias.sign_conflict == pytest.approx(2 / 8)
    assert bias.output_overlap is bias.input_overlap is None
    assert (to_q.cosine, to_q.sign_conflict, to_q.output_overlap) == (0.0, 0.0, 0.0)
    assert to_q.relative_norm == math.inf
    json.dumps(found.as_dict(), allow_nan=False)
    assert "- " in found.table()
    assert found.picture().mode == "RGB"


def test_tables_name_layers_blocks_and_where_adapters_fight(tmp_path):
    a, b = make(1), scaled(make(1), -1.0)
    ink, cat = a.save(tmp_path / "ink" / "adapter"), b.save(tmp_path / "cat" / "adapter")
    found = mmpeft.interference([ink, str(cat)])
    assert found.adapters == ("ink", "cat")
    text = found.text()
    assert text.startswith("ink and cat")
    assert "unet.down_blocks.0.resnets " in text
    assert "unet.up_blocks.1.attentions " in text
    assert f"  {TO_Q} (conflict 1.00)" in text
    table = found.table()
    assert TO_Q in table
    assert "all layers" in table
    assert "1.00 (" in table


def test_blocks_are_in_the_order_that_people_count():
    layers = {f"transformer.transformer_blocks.{n}.attn.to_q": (6, 5) for n in (0, 2, 10)}
    found = mmpeft.interference([make(1, 2, layers), make(2, 2, layers)])
    assert [m.layer for m in found.blocks(found.pairs[0])] == [
        f"transformer.transformer_blocks.{n}.attn" for n in (0, 2, 10)
    ]


def test_the_json_has_every_layer_of_every_pair():
    found = mmpeft.interference([make(1), make(2), make(3)])
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert data["adapters"] == ["adapter 1", "adapter 2", "adapter 3"]
    assert len(data["pairs"]) == 3
    first = data["pairs"][0]
    assert set(first["layers"]) == set(SHAPES)
    assert first["layers"][TO_Q]["norms"] == list(found.of(found.pairs[0])[1].norms)
    assert set(first["overall"]) == {
        "norms", "relative_norm", "cosine", "sign_conflict",
        "output_overlap", "input_overlap", "output_chance", "input_chance",
    }  # fmt: skip


def colours(picture):
    return {colour for _, colour in picture.getcolors(maxcolors=1 << 20)}


def test_the_picture_shows_who_works_against_whom():
    a = make(1)
    together = mmpeft.interference([a, scaled(a, 2.0)]).picture()
    against = mmpeft.interference([a, scaled(a, -2.0)]).picture()
    blue, orange = (58, 120, 196), (226, 116, 41)
    assert blue in colours(together)
    assert orange not in colours(together)
    assert orange in colours(against)
    assert blue not in colours(against)
    wider = mmpeft.interference([a, make(2), make(3)]).picture()
    assert wider.height == together.height
    assert wider.width > 2 * together.width


@pytest.mark.parametrize("adapters", [[], [make(1)]])
def test_fewer_than_two_adapters_are_refused(adapters):
    with pytest.raises(ConfigError, match=f"give at least two; got {len(adapters)}"):
        mmpeft.interference(adapters)


def test_adapters_of_other_bases_and_broken_ones_are_refused():
    with pytest.raises(BaseMismatch, match="adapter 2 and adapter 1 belong to different bases"):
        mmpeft.interference([make(1), make(2, layers={TO_Q: (12, 11)})])
    bad = make(2)
    bad[TO_Q].lora_A[0, 0] = float("nan")
    with pytest.raises(FormatError, match=f"adapter 2: {TO_Q} has numbers that are not finite"):
        mmpeft.interference([make(1), bad])


def test_a_mapping_gives_adapters_their_names():
    a, b = make(1), make(2)
    named = mmpeft.interference({"ink": a, "cat": b})
    assert named.pairs == (("ink", "cat"),)
    assert "ink and cat" in named.text()
    assert (
        named.overall(("ink", "cat")).norms
        == mmpeft.interference([a, b]).overall(("adapter 1", "adapter 2")).norms
    )


def test_adapters_without_a_layer_in_common_are_said_to_be():
    a, b = make(1, layers={TO_Q: SHAPES[TO_Q]}), make(2, layers={CONV: SHAPES[CONV]})
    found = mmpeft.interference({"ink": a, "cat": b})
    assert found.warnings == ("ink and cat change no layer in common, so nothing can interfere",)
    assert "look at this: ink and cat change no layer in common" in found.text()
    assert json.loads(json.dumps(found.as_dict()))["warnings"] == list(found.warnings)


@pytest.mark.parametrize("given", [make(1), "runs/ink/adapter"])
def test_one_adapter_that_is_in_no_list_is_refused(given):
    with pytest.raises(ConfigError, match="give a list of at least two"):
        mmpeft.interference(given)
