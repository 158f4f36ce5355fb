import pytest
import torch

from mmpeft.delta import Dense, LowRank
from mmpeft.methods.lokr import LokrLayer

SHAPES = {
    "lokr_w1": (3, 5),
    "lokr_w1_a": (3, 2),
    "lokr_w1_b": (2, 5),
    "lokr_w2": (20, 16),
    "lokr_w2_a": (20, 2),
    "lokr_w2_b": (2, 16),
}
WHOLE = ("lokr_w1", "lokr_w2")
FORMS = {
    "whole": WHOLE,
    "low-rank second": ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    "low-rank first": ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
    "low-rank both": ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
}


def tensors(names, transposed=False):
    generator = torch.Generator().manual_seed(0)
    shapes = {**SHAPES, "lokr_w1": (5, 3)} if transposed else SHAPES
    return {name: torch.randn(shapes[name], generator=generator) for name in names}


def expected(parts, scale):
    first = parts.get("lokr_w1")
    second = parts.get("lokr_w2")
    first = parts["lokr_w1_a"] @ parts["lokr_w1_b"] if first is None else first
    second = parts["lokr_w2_a"] @ parts["lokr_w2_b"] if second is None else second
    return scale * torch.kron(first, second)


@pytest.mark.parametrize("form", FORMS)
def test_the_change_is_a_kronecker_product(form):
    parts = tensors(FORMS[form])
    lokr = LokrLayer(3.0, **parts)
    assert lokr.shape == (60, 80)
    assert lokr.rank == (None if form == "whole" else 2)
    torch.testing.assert_close(lokr.dense(), expected(parts, 1.0 if form == "whole" else 1.5))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_low_rank_second_half_stays_low_rank_at_the_shorter_side_of_the_first(transposed):
    parts = tensors(FORMS["low-rank second"], transposed)
    delta = LokrLayer(3.0, **parts).delta()
    assert isinstance(delta, LowRank)
    assert delta.rank == 3 * 2
    torch.testing.assert_close(delta.dense(), expected(parts, 1.5))


def test_two_low_rank_halves_have_the_product_of_their_ranks():
    delta = LokrLayer(3.0, **tensors(FORMS["low-rank both"])).delta()
    assert isinstance(delta, LowRank)
    assert delta.rank == 4
    assert isinstance(LokrLayer(3.0, **tensors(WHOLE)).delta(), Dense)


def test_whole_halves_are_scaled_as_the_tool_does_that_saved_them():
    parts = tensors(WHOLE)
    assert LokrLayer(float("inf"), **parts).scale == 1.0
    assert LokrLayer(3.0, **parts, settings_rank=6).scale == 0.5
    # LyCORIS: alpha = rank^(3/2), scale = rank^(1/2)
    assert LokrLayer(8.0, **parts, rslora=True).scale == pytest.approx(2.0)


def test_a_core_makes_the_kernel_of_the_second_half():
    generator = torch.Generator().manual_seed(0)
    first, core = torch.randn(2, 2, generator=generator), torch.randn(1, 1, 3, 3, generator=generator)
    upper, lower = torch.randn(1, 3, generator=generator), torch.randn(1, 4, generator=generator)
    lokr = LokrLayer(1.0, lokr_w1=first, lokr_w2_a=upper, lokr_w2_b=lower, lokr_t2=core)
    second = torch.einsum("mb,mnhw,nd->bdhw", upper, core, lower)
    assert lokr.shape == (6, 8, 3, 3)
    torch.testing.assert_close(lokr.dense(), torch.kron(first[:, :, None, None], second))
