import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmpeft.errors import ConfigError
from mmpeft.mix import Mask, Mix, Schedule, Weight

TO_Q = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
HALF = torch.tensor([[0.0, 1.0]])


@pytest.mark.parametrize(
    ("points", "time", "factor"),
    [
        ([(0.5, 2.0)], 0.1, 2.0),
        ([(0.0, 0.0), (1.0, 1.0)], 0.25, 0.25),
        ([(0.2, 1.0), (0.6, 3.0)], 0.0, 1.0),
        ([(0.2, 1.0), (0.6, 3.0)], 0.4, 2.0),
        ([(0.2, 1.0), (0.6, 3.0)], 1.0, 3.0),
        ([(0.0, 1.0), (0.5, 1.0), (0.5, 4.0)], 0.4999, 1.0),
        ([(0.0, 1.0), (0.5, 1.0), (0.5, 4.0)], 0.5, 4.0),
        ([(0.0, 1.0), (0.2, -1.0), (0.7, 2.0), (1.0, 0.0)], 0.85, 1.0),
    ],
)
def test_a_schedule_is_linear_between_points_and_constant_outside(points, time, factor):
    found = Schedule(tuple(points)).at(torch.tensor([[time]]))
    torch.testing.assert_close(found, torch.tensor([[factor]]))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-3, 3)), min_size=1, max_size=6).map(
        lambda points: sorted({round(t, 2): f for t, f in points}.items())
    ),
    st.floats(0, 1),
)
def test_a_schedule_agrees_with_numpys_interpolation(points, time):
    expected = np.interp(time, [t for t, _ in points], [f for _, f in points])
    # float32 times, on rises of up to 6 over 0.01
    assert Schedule(tuple(points)).at(torch.tensor(time)).item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("time", "factor"), [(0.0, 0.0), (0.249, 0.0), (0.25, 1.0), (0.4, 1.0), (0.5, 1.0), (0.501, 0.0)]
)
def test_a_window_counts_fully_inside_and_not_at_all_outside(time, factor):
    assert Schedule.window(0.25, 0.5).at(torch.tensor(time)).item() == pytest.approx(factor)


def test_a_window_over_all_of_the_time_always_counts():
    assert Schedule.window(0, 1).at(torch.tensor([0.0, 0.3, 1.0])).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "points", [[], [(0.5, 1.0), (0.2, 1.0)], [(-0.1, 1.0)], [(1.5, 1.0)], [(float("nan"), 1.0)]]
)
def test_a_schedule_refuses_times_that_do_not_rise_from_noise_to_image(points):
    with pytest.raises(ConfigError, match="times rising from 0"):
        Schedule(tuple(points))


def test_a_schedule_refuses_factors_that_are_not_finite():
    with pytest.raises(ConfigError, match="finite numbers; got"):
        Schedule(((0.0, float("inf")),))


def test_a_mask_reads_pictures_and_arrays_alike():
    picture = Image.new("RGB", (4, 2), "black")
    picture.paste("white", (2, 0, 4, 2))
    array = np.array([[0, 0, 1, 1]] * 2)
    assert Mask(picture) == Mask(array) == Mask(torch.tensor(array))
    assert hash(Mask(picture)) == hash(Mask(array))
    assert Mask(picture) != Mask(array[:1])
    assert "2 x 4, mean 0.50" in repr(Mask(array))


@pytest.mark.parametrize("area", [np.ones(3), np.full((2, 2), 1.5), np.zeros((0, 4)), [[float("nan")]]])
def test_a_mask_refuses_what_is_no_plane_of_shares(area):
    with pytest.raises(ConfigError, match="numbers from 0 to 1"):
        Mask(area)


@pytest.mark.parametrize(("size", "new"), [((8, 8), (2, 4)), ((6, 10), (4, 7)), ((3, 2), (9, 8))])
def test_a_resized_mask_keeps_its_mean(size, new):
    mask = Mask(torch.rand(size, generator=torch.Generator().manual_seed(0)))
    resized = mask.resized(*new)
    assert resized.shape == new
    torch.testing.assert_close(resized.mean(), mask.area.mean())


def test_resizing_by_whole_numbers_is_the_mean_of_the_area():
    mask = Mask(torch.rand((12, 8), generator=torch.Generator().manual_seed(0)))
    means = torch.nn.functional.avg_pool2d(mask.area[None, None], (3, 2))[0, 0]
    torch.testing.assert_close(mask.resized(4, 4), means)
    assert torch.equal(Mask(HALF).resized(1, 4), torch.tensor([[0.0, 0, 1, 1]]))


def test_a_mask_that_is_the_same_everywhere_is_a_factor():
    assert Weight(0.8, mask=Mask(torch.ones(4, 4))) == Weight(0.8)
    assert Weight(0.8, mask=Mask(torch.zeros(4, 4))) == Weight(0.0)
    assert Weight(0.8, mask=Mask(torch.full((2, 2), 0.5))) == Weight(0.4)
    assert not Weight(mask=Mask(torch.ones(4, 4))).varies
    assert Weight(mask=Mask(HALF)).varies


@pytest.mark.parametrize(
    ("weight", "layer", "factor"),
    [
        (0.7, TO_Q, 0.7),
        (np.float32(0.5), TO_Q, 0.5),
        ({"unet": 0.5}, TO_Q, 0.5),
        ({"unet": 0.5}, "text_encoder.text_model.encoder.layers.0.mlp.fc1", 1.0),
        ({"unet": {"down": 0.3, "mid": 0.4}}, TO_Q, 0.3),
        ({"unet": {"down": 0.3, "mid": 0.4}}, "unet.mid_block.resnets.0.conv1", 0.4),
        ({"unet": {"down": {"block_0": [0.1, 0.2]}}}, TO_Q, 0.2),
        ({"unet": {"down": {"block_0": 0.6, "block_1": 0.1}}}, TO_Q, 0.6),
        ({"down": 0.3}, TO_Q, 0.3),
        ({"unet.down_blocks.0": 0.3}, TO_Q, 0.3),
        ({"attn1.to_q": 0.3}, TO_Q, 0.3),
        ({"unet": 0.5, "attn1.*": 0.3}, TO_Q, 0.3),
        ({"transformer_blocks.1": 0.3}, "transformer.transformer_blocks.10.attn.to_q", 1.0),
    ],
)
def test_a_weight_per_component_or_block_is_read_at_each_layer(weight, layer, factor):
    assert Weight.of(weight).at(layer) == pytest.approx(factor)


def test_the_value_multiplies_the_blocks_factor():
    assert Weight(0.5, blocks=(("unet", 0.4),)).at(TO_Q) == pytest.approx(0.2)


def test_blocks_that_are_none_of_the_layers_are_refused():
    Weight.of({"unet": {"down": 0.3}}).check([TO_Q])
    with pytest.raises(ConfigError, match="'transformer' is no component, block or layer"):
        Weight.of({"transformer": 0.3}).check([TO_Q])


@pytest.mark.parametrize("value", ["0.5", None, True, float("nan"), float("inf"), [1.0]])
def test_a_weight_that_is_no_finite_number_is_refused_with_its_adapter(value):
    with pytest.raises(ConfigError, match="the weight of 'ink': must be a finite number"):
        Mix.of(ink=value)


def test_blocks_of_a_unets_half_have_their_names():
    with pytest.raises(ConfigError, match="'first'"):
        Weight.of({"unet": {"down": {"first": 1.0}}})


def test_weights_per_sample_need_samples():
    with pytest.raises(ConfigError, match="one factor for each prompt"):
        Weight(samples=())


def test_points_areas_and_blocks_are_understood_where_their_types_are_meant():
    points = [(0, 0), (0.5, 1)]
    plain = Weight(0.8, blocks={"unet": {"down": 0.3}}, schedule=points, mask=HALF)
    blocks = Weight.of({"unet": {"down": 0.3}}).blocks
    assert plain == Weight(0.8, blocks=blocks, schedule=Schedule(points), mask=Mask(HALF))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Weight(schedule=lambda time: time), "a schedule is a list of .time, factor."),
        (lambda: Schedule((1, 2)), "a schedule is a list of .time, factor."),
        (lambda: Schedule.window(0.8, 0.2), "from a time to a later one, both from 0 to 1; got 0.8 and 0.2"),
        (lambda: Schedule.window(-1, 2), "from a time to a later one, both from 0 to 1; got -1 and 2"),
        (lambda: Weight(samples=1.0), "one factor for each prompt; got 1.0"),
        (lambda: Weight(samples=["x"]), "must be a finite number"),
        (lambda: Mask("left.png"), "or an opened picture; got 'left.png'"),
        (lambda: Mask([[1], [1, 0]]), "numbers, or an opened picture; got"),
        (lambda: Mask([[0, 2]]), "numbers from 0 to 1; got 0 to 2"),
        (lambda: Mask([[0, float("nan")]]), "numbers from 0 to 1; got nan"),
        (lambda: Mask(torch.ones(3, 4, 4)), r"got shape \(3, 4, 4\)"),
    ],
)
def test_parts_of_a_weight_that_cannot_be_are_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


@pytest.mark.parametrize(
    "more",
    [
        {"schedule": Schedule.window(0, 0.5)},
        {"mask": Mask(HALF)},
        {"samples": (1.0, 0.0)},
        {"conditional_only": True},
    ],
)
def test_a_weight_says_whether_it_varies(more):
    assert not Weight.of({"unet": 0.5}).varies
    assert Weight(**more).varies


def test_a_mix_is_a_value():
    def make():
        return Mix.of({"a": 0.5, "b": Weight(0.3, schedule=Schedule.window(0, 0.5), mask=Mask(HALF))}, c=1)

    assert make() == make() == Mix.of(make()) == pickle.loads(pickle.dumps(make()))
    assert hash(make()) == hash(make())
    assert make() != Mix.of(make(), c=2)
    assert len({make(), make()}) == 1


def test_what_a_mix_does_not_name_counts_nothing():
    assert Mix.of(a=0.5).at("a", TO_Q) == 0.5
    assert Mix.of(a=0.5).at("b", TO_Q) == 0.0


def test_mixes_for_prompts_become_weights_per_sample():
    window = Schedule.window(0, 0.5)
    mix = Mix.for_prompts([{"a": 0.5, "b": 1.0}, {}, Mix.of(a=-1.0, b=1.0, c=Weight(2.0, schedule=window))])
    assert mix == Mix.of(
        a=Weight(samples=(0.5, 0.0, -1.0)),
        b=Weight(samples=(1.0, 0.0, 1.0)),
        c=Weight(schedule=window, samples=(0.0, 0.0, 2.0)),
    )
    assert Mix.for_prompts([{"a": 0.5}, {"a": 0.5}]) == Mix.of(a=0.5)
    assert Mix.for_prompts([{}, {}]) == Mix()


@pytest.mark.parametrize(
    "mixes",
    [
        [{"a": Weight(mask=Mask(HALF))}, {"a": 1.0}],
        [{"a": {"unet": 0.5}}, {"a": {"unet": 0.6}}],
        [{"a": Weight(samples=(1.0, 2.0))}],
    ],
)
def test_weights_of_prompts_that_differ_in_more_than_numbers_are_refused(mixes):
    with pytest.raises(ConfigError, match="'a' for different prompts may differ in their numbers alone"):
        Mix.for_prompts(mixes)


def test_mixes_for_no_prompts_are_refused():
    with pytest.raises(ConfigError, match="one mix for each prompt; got none"):
        Mix.for_prompts([])


@pytest.mark.parametrize("mix", ["ink", ["ink"], 0.5])
def test_a_mix_that_names_no_weights_is_refused(mix):
    with pytest.raises(ConfigError, match="a mix is adapter names with their weights; got"):
        Mix.of(mix)
