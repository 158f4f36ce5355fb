"""Composition through the public door, on adapters built in code and on a tiny Stable Diffusion."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.backbones.fingerprint import Fingerprint
from mmpeft.composition.compose import DifferentBasesWarning, replay
from mmpeft.composition.report import Errors
from mmpeft.errors import AdapterError, BaseMismatch, ConfigError, FormatError, MethodError
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.full import FullLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.mix import Schedule, Weight

TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
FC1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
SHAPES = {TO_Q: (12, 10), CONV: (6, 4, 3, 3), FC1: (16, 8)}


def make(seed, rank=2, alpha=None, layers=SHAPES, card=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (out, *rest) in sorted(layers.items()):
        A = torch.randn(rank, *rest, generator=generator).to(dtype)
        B = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator).to(dtype)
        made[name] = LoraLayer(A, B, float(rank if alpha is None else alpha))
    return Adapter(made, card)


@pytest.fixture(scope="module")
def tiny_pipeline(tiny_sd_folder):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny_sd_folder)


def weighted_sum(layer, *pairs):
    return sum(weight * adapter[layer].dense().double() for adapter, weight in pairs if layer in adapter)


# what comes out


def test_a_sum_is_the_weighted_sum_of_the_changes_and_its_rank_adds_up():
    a, b = make(1, rank=2, alpha=5), make(2, rank=3, alpha=1)
    merged, report = mmpeft.compose([(a, 0.8), (b, -0.6)])
    assert merged.layers == a.layers
    for layer, shape in SHAPES.items():
        assert merged[layer].shape == shape
        assert (merged[layer].rank, merged[layer].alpha) == (5, 5.0)
        expected = weighted_sum(layer, (a, 0.8), (b, -0.6)).float()
        torch.testing.assert_close(merged[layer].dense(), expected, rtol=1e-5, atol=1e-5)
    assert merged[CONV].lora_A.shape == (5, 4, 3, 3)
    assert merged[CONV].lora_B.shape == (6, 5, 1, 1)
    assert float(report.error) == 0.0
    assert report.ranks == dict.fromkeys(SHAPES, 5)


def test_layers_that_only_one_adapter_has_are_in_the_result():
    a, b = make(1, layers={TO_Q: (12, 10)}), make(2, layers={FC1: (16, 8)})
    merged, _ = mmpeft.compose([(a, 0.5), (b, 2.0)])
    assert merged.layers == (FC1, TO_Q)
    torch.testing.assert_close(merged[FC1].dense(), 2 * b[FC1].dense())


@given(st.floats(-2, 2).filter(bool), st.sampled_from(["sum", "svd"]))
def test_an_adapter_of_weight_0_is_not_there(weight, strategy):
    a, b = make(1), make(2, rank=3)
    with_it, _ = mmpeft.compose([(a, weight), (b, 0.0)], strategy)
    without, _ = mmpeft.compose([(a, weight)], strategy)
    assert with_it.digest == without.digest


def test_weights_of_0_make_a_valid_adapter_that_changes_nothing(tmp_path):
    bias = f"{TO_Q}.bias"
    b = Adapter({bias: FullLayer(torch.ones(12))})
    merged, report = mmpeft.compose([(make(1), 0.0), (b, 0)], "ties", rank=4)
    assert merged.layers == tuple(sorted([*SHAPES, bias]))
    assert all(not layer.dense().any() for layer in merged.values())
    assert merged[CONV].rank == 1
    assert merged[bias].shape == (12,)
    assert float(report.error) == 0.0
    only_lora, _ = mmpeft.compose([(make(1), 0.0)])
    assert mmpeft.load_adapter(only_lora.save(tmp_path / "nothing")).digest == only_lora.digest


def test_weights_per_block_count_in_their_blocks():
    a = make(1)
    merged, _ = mmpeft.compose([(a, {"unet": {"down": 0.5}, "text_encoder": 0.0})])
    torch.testing.assert_close(merged[CONV].dense(), 0.5 * a[CONV].dense())
    torch.testing.assert_close(merged[TO_Q].dense(), a[TO_Q].dense())
    assert not merged[FC1].dense().any()
    assert merged.card.parents[0]["weight"]["blocks"]


def test_half_precision_comes_in_and_float32_is_computed():
    a, b = make(1, dtype=torch.bfloat16), make(2, dtype=torch.float16)
    merged, _ = mmpeft.compose([(a, 0.3), (b, 0.7)])
    assert merged[TO_Q].lora_A.dtype == torch.float32
    expected = weighted_sum(TO_Q, (a, 0.3), (b, 0.7)).float()
    torch.testing.assert_close(merged[TO_Q].dense(), expected, rtol=1e-5, atol=1e-5)


def test_the_gauge_of_the_factors_decides_nothing_and_they_come_out_balanced():
    a = make(1)
    layer = a[TO_Q]
    skewed = Adapter({TO_Q: LoraLayer(layer.lora_A * 1024, layer.lora_B / 1024, layer.alpha)})
    merged, _ = mmpeft.compose([(skewed, 0.8)])
    plain, _ = mmpeft.compose([(a, 0.8)])
    # powers of two round nothing
    assert torch.equal(merged[TO_Q].dense(), plain[TO_Q].dense())
    lengths = merged[TO_Q].lora_A.norm(dim=1) / merged[TO_Q].lora_B.norm(dim=0)
    assert ((lengths > 0.49) & (lengths < 2.01)).all()


def test_numbers_near_the_end_of_float32_come_out_balanced_too():
    a = make(1)
    merged, _ = mmpeft.compose([(a, 1e30)])
    expected = a[TO_Q].dense().double() * 1e30
    torch.testing.assert_close(merged[TO_Q].dense().double(), expected, rtol=1e-5, atol=1e25)
    assert merged[TO_Q].lora_A.abs().max() < 1e17


def test_composing_leaves_the_parents_as_they_were_and_shares_no_memory_with_them():
    a, b = make(1), Adapter({TO_Q: FullLayer(torch.ones(12, 10))})
    before = a.digest, b.digest
    merged, _ = mmpeft.compose([(a, 1.0)])
    full, _ = mmpeft.compose([(b, 1.0)])
    for layer in (merged[TO_Q], full[TO_Q]):
        for tensor in layer.tensors.values():
            tensor.zero_()
    assert (a.digest, b.digest) == before


# strategies


@pytest.mark.parametrize("strategy", ["ties", "dare", "dare_ties", "magnitude"])
def test_strategies_that_need_every_entry_give_full_differences_unless_a_rank_is_given(strategy):
    pairs = [(make(1), 0.8), (make(2), 0.6)]
    full, report = mmpeft.compose(pairs, strategy)
    assert {layer.method for layer in full.values()} == {"full"}
    assert full[CONV].shape == SHAPES[CONV]
    assert set(report.ranks.values()) == {None}
    assert any("3 layers are full differences" in sentence for sentence in report.warnings)
    low, report = mmpeft.compose(pairs, strategy, rank=3)
    assert set(report.ranks.values()) == {3}
    for layer in SHAPES:
        values = torch.linalg.svdvals(full[layer].dense().flatten(1).double())
        expected = float(values[3:].norm() / values.norm())
        assert report.error[layer] == pytest.approx(expected, rel=1e-4)
        lost = (low[layer].dense() - full[layer].dense()).norm() / full[layer].dense().norm()
        assert float(lost) == pytest.approx(expected, rel=1e-3)


def test_what_truncation_loses_is_said_with_what_higher_ranks_would_lose():
    _, report = mmpeft.compose([(make(1), 0.8), (make(2), 0.6)], "ties", rank=2)
    assert float(report.error) > 0.1
    (sentence,) = report.warnings
    worst, most = report.error.worst
    assert sentence.startswith("a ties result is not low-rank: rank 2 loses ")
    assert worst in sentence
    assert f"{100 * most:.2g} %" in sentence
    assert "; rank 4 would lose " in sentence
    assert "; rank 8 would lose " in sentence


def test_the_overall_error_is_that_of_all_layers_together():
    pairs = [(make(1), 0.8), (make(2), 0.6)]
    full, _ = mmpeft.compose(pairs, "magnitude", density=0.5)
    low, report = mmpeft.compose(pairs, "magnitude", density=0.5, rank=2)
    lost = torch.cat([(low[n].dense() - full[n].dense()).flatten() for n in SHAPES]).norm()
    whole = torch.cat([full[n].dense().flatten() for n in SHAPES]).norm()
    assert float(report.error) == pytest.approx(float(lost / whole), rel=1e-4)
    assert max(report.error.layers.values()) >= float(report.error) >= min(report.error.layers.values())


@pytest.mark.parametrize("strategy", ["sum", "svd", "ties"])
def test_an_error_chooses_the_smallest_rank_that_keeps_it(strategy):
    pairs = [(make(1), 0.8), (make(2), 0.1)]
    whole, _ = mmpeft.compose(pairs, strategy)
    _, report = mmpeft.compose(pairs, strategy, error=0.3)
    for layer in SHAPES:
        values = torch.linalg.svdvals(whole[layer].dense().flatten(1).double())
        tails = [float(values[rank:].norm() / values.norm()) for rank in range(len(values) + 1)]
        assert report.ranks[layer] == next(rank for rank, tail in enumerate(tails) if tail <= 0.3)
        assert report.error[layer] <= 0.3


def test_svd_states_its_error_against_the_exact_sum():
    a, b = make(1, rank=3), make(2, rank=3)
    merged, report = mmpeft.compose([(a, 1.0), (b, 0.5)], "svd", rank=4)
    for layer in SHAPES:
        exact = weighted_sum(layer, (a, 1.0), (b, 0.5))
        lost = (merged[layer].dense() - exact).norm() / exact.norm()
        assert report.error[layer] == pytest.approx(float(lost), rel=1e-4)
    assert report.warnings[0].startswith("rank 4 loses ")
    assert "rank 8 would lose 0 %" in report.warnings[0]


def test_a_single_adapter_is_shrunk_by_svd_and_by_energy():
    a = make(1, rank=6)
    _, report = mmpeft.compose([(a, 1.0)], "svd", rank=2)
    assert set(report.ranks.values()) == {2}
    _, report = mmpeft.compose([(a, 1.0)], "svd", energy=0.9)
    assert all(error <= 0.1**0.5 for error in report.error.layers.values())
    assert max(report.ranks.values()) < 6


def test_draws_depend_on_the_seed_and_the_layer_alone():
    a, b = make(1), make(2)
    one, _ = mmpeft.compose([(a, 0.8), (b, 0.6)], "dare", seed=3)
    again, _ = mmpeft.compose([(a, 0.8), (b, 0.6)], "dare", seed=3)
    other, _ = mmpeft.compose([(a, 0.8), (b, 0.6)], "dare", seed=4)
    assert one.digest == again.digest != other.digest
    fewer = [(Adapter({TO_Q: adapter[TO_Q]}), weight) for adapter, weight in ((a, 0.8), (b, 0.6))]
    alone, _ = mmpeft.compose(fewer, "dare", seed=3)
    assert torch.equal(alone[TO_Q].diff, one[TO_Q].diff)


# bases, and methods that need them


def test_a_change_that_depends_on_the_base_is_exact_with_it_and_refused_without(
    tiny_pipeline, attach_randomly, tmp_path
):
    dora = attach_randomly(copy.deepcopy(tiny_pipeline), "dora", rank=2, alpha=3)
    lora = attach_randomly(copy.deepcopy(tiny_pipeline), "lora", seed=1, rank=3, unet=("*attn1.to_q",))
    with pytest.raises(AdapterError, match=r"adapter 1: .* depends on the base's weight; give"):
        mmpeft.compose([(dora, 1.0)])
    mmpeft.compose([(dora, 0.0), (lora, 1.0)])
    merged, _ = mmpeft.compose([(dora, 0.5), (lora, 1.0)], base=tiny_pipeline)
    modules = {"unet": tiny_pipeline.unet, "text_encoder": tiny_pipeline.text_encoder}
    for layer in dora.layers:
        component, _, disk = layer.partition(".")
        live = disk.removeprefix("text_model.") if component == "text_encoder" else disk
        weight = modules[component].get_submodule(live).weight
        expected = 0.5 * dora[layer].dense(weight)
        if layer in lora:
            expected = expected + lora[layer].dense()
        torch.testing.assert_close(merged[layer].dense(), expected, rtol=1e-5, atol=1e-5)
    loaded = mmpeft.load_adapter(dora.save(tmp_path / "dora"), base=tiny_pipeline)
    bound, _ = mmpeft.compose([(loaded, 0.5), (lora, 1.0)])
    assert bound.digest == merged.digest
    from_paths, _ = mmpeft.compose([(tmp_path / "dora", 0.5), (lora, 1.0)], base=modules)
    assert from_paths.digest == merged.digest


def test_an_adapter_that_does_not_fit_the_base_is_refused(tiny_pipeline):
    with pytest.raises(BaseMismatch, match=r"does not fit this base.* 0 of 3 layers match"):
        mmpeft.compose([(make(1), 1.0)], base=tiny_pipeline)


def test_layers_of_one_name_and_other_shapes_are_refused_by_both_names(tmp_path):
    ink = make(1).save(tmp_path / "ink" / "adapter")
    cat = make(2, layers={**SHAPES, TO_Q: (12, 14)}).save(tmp_path / "cat" / "adapter")
    with pytest.raises(
        BaseMismatch, match=rf"cat and ink belong to different bases: {TO_Q} is \(12, 14\) in cat"
    ):
        mmpeft.compose([(ink, 1.0), (cat, 1.0)])


def test_a_flattened_convolution_meets_one_that_knows_its_kernel():
    a = make(1)
    flat = make(2, layers={CONV: (6, 36)})
    merged, _ = mmpeft.compose([(flat, 1.0), (a, 1.0)])
    assert merged[CONV].shape == (6, 4, 3, 3)
    expected = a[CONV].dense() + flat[CONV].dense().reshape(6, 4, 3, 3)
    torch.testing.assert_close(merged[CONV].dense(), expected, rtol=1e-5, atol=1e-5)
    alone, _ = mmpeft.compose([(flat, 1.0)])
    assert alone[CONV].shape == (6, 36)


def on_base(title, noise=0.0, prediction="epsilon", layers=SHAPES):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in layers.items():
        weight = torch.randn(shape, generator=generator)
        weights[name] = weight + noise * torch.randn(shape, generator=generator)
    return AdapterCard(base=title, fingerprint=Fingerprint.of(weights, prediction).to_json())


def test_different_fine_tunes_of_a_base_are_warned_of_once():
    a, b = make(1, card=on_base("sd15")), make(2, card=on_base("dreamy", noise=0.2))
    with pytest.warns(DifferentBasesWarning) as caught:
        merged, report = mmpeft.compose([(a, 1.0), (b, 1.0), (b, 1.0)])
    (warning,) = caught
    sentence = str(warning.message)
    assert "adapter 1 was trained on sd15 and adapter 2 was trained on dreamy: same shapes" in sentence
    assert sentence.endswith("% apart")
    assert sentence in report.warnings
    assert (merged.card.base, merged.card.fingerprint) == ("", None)


def test_bases_that_predict_other_things_are_refused():
    a, b = make(1, card=on_base("sd15")), make(2, card=on_base("sd21", prediction="v"))
    with pytest.raises(
        BaseMismatch, match=r"trained on sd15 and .* on sd21, .* one predicts epsilon, the other v"
    ):
        mmpeft.compose([(a, 1.0), (b, 1.0)])


def test_adapters_of_one_base_with_other_layers_keep_its_name_and_a_fingerprint_of_all_layers():
    attention, mlp = {TO_Q: SHAPES[TO_Q]}, {FC1: SHAPES[FC1]}
    a = make(1, layers=attention, card=on_base("sd15", layers=attention))
    b = make(2, layers=mlp, card=on_base("sd15", layers=mlp))
    merged, report = mmpeft.compose([(a, 1.0), (b, 1.0)])
    assert merged.card.base == "sd15"
    assert set(merged.card.fingerprint["layers"]) == {TO_Q, FC1}
    assert report.warnings == ()


class PromptLayer(LayerAdapter):
    method = "prompt"

    @property
    def tensors(self):
        return {"prompt": torch.zeros(4, 8)}

    @property
    def shape(self):
        return (4, 8)

    def delta(self, weight=None):
        raise MethodError("a prompt is no change of a weight, and cannot be composed")


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_method_that_is_no_weight_change_is_refused_with_its_own_sentence(weight):
    with pytest.raises(MethodError, match="adapter 2: a prompt is no change of a weight"):
        mmpeft.compose([(make(1), 1.0), (Adapter({TO_Q: PromptLayer()}), weight)])


# lineage


def test_the_card_tells_parents_weights_and_how_to_do_it_again(tmp_path):
    card = AdapterCard(base="sd15", trigger="ink style", seed=3)
    a, b = make(1, card=card), make(2, card=AdapterCard(trigger="sks"))
    merged, _ = mmpeft.compose([(a, 0.8), (b, {"unet": 0.5})], "ties", rank=3, seed=7, density=0.3)
    ours = merged.card
    assert (ours.base, ours.trigger, ours.seed) == ("sd15", "ink style, sks", None)
    first, second = ours.parents
    assert first == {
        "digest": a.digest, "weight": 0.8, "base": "sd15", "trigger": "ink style", "methods": ["lora"],
    }  # fmt: skip
    assert second["digest"] == b.digest
    recipe = ours.recipe["compose"]
    assert (recipe["strategy"], recipe["rank"], recipe["error"], recipe["seed"]) == ("ties", 3, None, 7)
    assert recipe["settings"]["density"] == 0.3
    read = mmpeft.load_adapter(merged.save(tmp_path / "merged")).card
    assert json.loads(json.dumps(read.recipe)) == ours.recipe
    page = (tmp_path / "merged" / "README.md").read_text()
    assert "mmpeft compose --like path/to/this/folder" in page
    assert a.digest in page


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [("sum", {}), ("svd", {"rank": 3}), ("dare_ties", {"rank": 2, "seed": 5, "density": 0.7})],
)
def test_a_composition_is_made_again_byte_for_byte_from_its_parents_in_any_order(
    tmp_path, strategy, settings
):
    for number, name in enumerate(("ink", "cat", "blue")):
        make(number, rank=number + 1).save(tmp_path / name)
    ink, cat, blue = (tmp_path / name for name in ("ink", "cat", "blue"))
    merged, _ = mmpeft.compose(
        [(ink, 0.8), (cat, {"unet.down_blocks": -0.5}), (blue, 0.1)], strategy, **settings
    )
    folder = merged.save(tmp_path / "merged")
    again, report = replay(folder, [blue, ink, cat])
    assert again.digest == merged.digest
    assert report.strategy == strategy
    other = again.save(tmp_path / "again")
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            assert (other / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_replay_says_where_its_result_is_another():
    a, b = make(1), make(2)
    merged, _ = mmpeft.compose([(a, 0.8), (b, 0.6)])
    assert replay(merged, [a, b])[1].warnings == ()
    tampered = Adapter(make(9), merged.card)
    (sentence,) = replay(tampered, [a, b])[1].warnings
    assert sentence.startswith("the result is not byte for byte this adapter, which was made with mmpeft ")


def test_replay_names_the_parents_that_are_missing_and_refuses_strangers():
    a, b, stranger = make(1, card=AdapterCard(trigger="ink style")), make(2), make(3)
    merged, _ = mmpeft.compose([(a, 0.8), (b, 0.6)])
    with pytest.raises(AdapterError, match=rf"1 of them .* {a.digest} \(lora trigger 'ink style'\)"):
        replay(merged, [b])
    with pytest.raises(AdapterError, match="adapter 2 is no parent of this adapter"):
        replay(merged, [b, stranger, a])
    with pytest.raises(AdapterError, match="was not composed: its card names no parents"):
        replay(a, [b])


# the report


def test_the_report_reads_well_and_is_json():
    _, report = mmpeft.compose([(make(1), 0.8), (make(2), 0.6)], "ties", rank=2)
    lines = report.text().splitlines()
    assert lines[0].startswith("2 adapters composed by ties in ")
    assert lines[0].endswith("rank 2 on 3 layers")
    assert lines[1].startswith("lost by truncation: ")
    assert lines[2].startswith("look at this: a ties result is not low-rank")
    data = json.loads(json.dumps(report.as_dict()))
    assert data["error"] == float(report.error)
    assert data["layers"][TO_Q] == {"error": report.error[TO_Q], "rank": 2}


def test_errors_are_a_number_that_knows_its_layers_and_survives_copies():
    errors = Errors.of({"a": (0.5, 3.0), "b": (0.0, 4.0)})
    assert errors == pytest.approx(0.3)
    assert errors["a"] == 0.5
    for other in (copy.copy(errors), copy.deepcopy(errors), pickle.loads(pickle.dumps(errors))):
        assert (other, other.layers) == (errors, errors.layers)
    assert Errors.of({"a": (0.0, 0.0)}) == 0.0


# what cannot be done


@pytest.mark.parametrize(
    ("strategy", "options", "sentence"),
    [
        ("tise", {}, "no strategy is called 'tise'; did you mean 'ties'"),
        ("ties", {"densty": 0.5}, "ties has no setting called 'densty'; did you mean 'density'"),
        ("sum", {"density": 0.5}, "the strategy sum has no setting called 'density'"),
        ("ties", {"energy": 0.5}, "ties has no setting called 'energy'"),
        ("ties", {"density": "half"}, r"ties.density: input should be a valid number; got 'half'"),
        ("dare", {"generator": None}, "dare has no setting called 'generator'"),
        ("svd", {"rank": 0}, "rank: must be a whole number of at least 1; got 0"),
        ("svd", {"rank": 2.5}, "rank: must be a whole number of at least 1; got 2.5"),
        ("sum", {"error": 1.5}, "error: must be a share between 0 and 1; got 1.5"),
        ("dare", {"seed": "x"}, "seed: must be a whole number; got 'x'"),
        ("sum", {"error": "low"}, "error: must be a share between 0 and 1; got 'low'"),
    ],
)
def test_settings_that_cannot_be_are_refused(strategy, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        mmpeft.compose([(make(1), 1.0)], strategy, **options)


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (float("nan"), "the weight of adapter 1: must be a finite number"),
        ("strong", "the weight of adapter 1: must be a finite number"),
        (Weight(schedule=Schedule.window(0, 0.5)), "the weight of adapter 1 varies with time"),
        ({"unet": {"down_blcks": 0.5}}, "adapter 1: weights per block: .* is no component, block or layer"),
    ],
)
def test_weights_that_cannot_be_are_refused(weight, sentence):
    with pytest.raises(ConfigError, match=sentence):
        mmpeft.compose([(make(1), weight)])


@pytest.mark.parametrize(
    ("adapters", "kind", "sentence"),
    [
        ([], ConfigError, "nothing to compose"),
        (["runs/ink"], ConfigError, r"give \(adapter or path, weight\) pairs; got str 'runs/ink'"),
        ([(42, 1.0)], ConfigError, "an adapter or the path of one is needed; got int"),
        ([("/no/adapter", 1.0)], AdapterError, "there is no adapter at /no/adapter"),
        ([(Adapter({}), 1.0)], AdapterError, "adapter 1 is empty"),
    ],
)
def test_what_is_no_adapter_is_refused(adapters, kind, sentence):
    with pytest.raises(kind, match=sentence):
        mmpeft.compose(adapters)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_adapter_and_layer(broken):
    bad = make(2)
    bad[CONV].lora_B[0, 0] = broken
    with pytest.raises(FormatError, match=f"adapter 2: {CONV} has numbers that are not finite in lora_B"):
        mmpeft.compose([(make(1), 1.0), (bad, 0.5)])


def test_a_result_that_overflows_is_refused():
    a = make(1)
    huge = Adapter({name: LoraLayer(l.lora_A * 1e25, l.lora_B * 1e25, l.alpha) for name, l in a.items()})
    with pytest.raises(MethodError, match="not finite"):
        mmpeft.compose([(huge, 1e20)], "ties")


def test_adapters_of_one_folder_name_are_told_apart_by_the_folder_above(tmp_path):
    ink, cat = make(1).save(tmp_path / "ink" / "adapter"), make(2).save(tmp_path / "cat" / "adapter")
    with pytest.raises(ConfigError, match=r"^the weight of cat: weights per block"):
        mmpeft.compose([(ink, 1.0), (cat, {"nowhere": 0.5})])
