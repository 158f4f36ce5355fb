import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft import randomness

keys = st.lists(st.one_of(st.integers(0, 2**40), st.text(max_size=8)), max_size=4)


@given(st.integers(0, 2**40), keys)
def test_the_same_place_draws_the_same(seed, place):
    assert torch.equal(randomness.normal((3,), seed, *place), randomness.normal((3,), seed, *place))


@given(keys, keys)
def test_different_places_have_different_seeds(one, other):
    if one != other:
        assert randomness.seed_of(0, *one) != randomness.seed_of(0, *other)


def test_golden_seed_never_changes():
    assert randomness.seed_of(0, "noise", 7, 3) == 1756661879736797415


def test_a_number_and_its_text_are_different_keys():
    assert randomness.seed_of(0, 1) != randomness.seed_of(0, "1")


def test_draws_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    randomness.normal((5,), 1, "x")
    assert torch.equal(torch.rand(2), expected)


def test_reseeding_the_globals_repeats_dropout():
    randomness.reseed_globals(0, "step", 1)
    first = torch.nn.functional.dropout(torch.ones(50))
    randomness.reseed_globals(0, "step", 1)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(50)), first)
