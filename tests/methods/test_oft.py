import pytest
import torch

from mmpeft.errors import AdapterError, MethodError
from mmpeft.methods.oft import InputOftLayer, OftLayer


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def test_outputs_turn_within_blocks(draw):
    layer, weight = OftLayer(draw(2, 3, 3)), draw(6, 4)
    new = weight + layer.dense(weight)
    for block in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(new[block].norm(dim=0), weight[block].norm(dim=0))
    assert (new - weight).norm() > 1
    torch.testing.assert_close(OftLayer(draw(2, 3, 3) * 0).dense(weight), torch.zeros(6, 4))


def test_the_constraint_bounds_the_turn(draw):
    blocks, weight = draw(2, 3, 3), draw(6, 4)
    skew = blocks - blocks.mT
    alpha = 0.5 * float(skew.norm()) / 6
    half = OftLayer(blocks / 2)
    torch.testing.assert_close(OftLayer(blocks, alpha).dense(weight), half.dense(weight))
    torch.testing.assert_close(OftLayer(blocks, 100.0).dense(weight), OftLayer(blocks).dense(weight))


def test_a_butterfly_keeps_the_norm_of_all_outputs_and_reaches_them_all(draw):
    layer, weight = OftLayer(draw(3, 4, 2, 2)), draw(8, 4)
    new = weight + layer.dense(weight)
    torch.testing.assert_close(new.norm(dim=0), weight.norm(dim=0))
    one = torch.zeros(8, 1)
    one[0] = 1
    assert (one + layer.dense(one) != 0).all()


def test_inputs_turn_by_the_exact_transform(draw):
    layer, weight = InputOftLayer(draw(2, 3), neumann_terms=0), draw(4, 6)
    new = weight + layer.dense(weight)
    for block in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(new[:, block].norm(dim=1), weight[:, block].norm(dim=1))


def test_pefts_series_turns_against_its_exact_transform(draw):
    entries, weight = 0.01 * draw(2, 3), draw(4, 6)
    exact, opposite = (InputOftLayer(sign * entries, neumann_terms=0).dense(weight) for sign in (1, -1))
    series = InputOftLayer(entries).dense(weight)
    torch.testing.assert_close(series, opposite, rtol=1e-3, atol=1e-5)  # the series' rest is of fourth order
    assert (series - exact).norm() > series.norm()


def test_a_shared_block_fits_any_number_of_inputs(draw):
    layer = InputOftLayer(draw(1, 3), block_share=True)
    assert layer.shape == (-1, -1)
    assert layer.dense(draw(4, 9)).shape == (4, 9)
    with pytest.raises(MethodError, match="blocks of 3 inputs do not make the 8 inputs"):
        layer.dense(draw(4, 8))


def test_a_turn_of_patches_is_no_change_of_the_weight(draw):
    layer = InputOftLayer(draw(3, 15))
    assert layer.dense(draw(4, 18, 1, 1)).shape == (4, 18, 1, 1)
    with pytest.raises(MethodError, match="PEFT's OFT of a 3x3 convolution is no change of its weight"):
        layer.delta(draw(4, 2, 3, 3))


def test_the_weight_is_needed(draw):
    for layer in (OftLayer(draw(2, 3, 3)), InputOftLayer(draw(2, 3))):
        with pytest.raises(AdapterError, match="depends on the base's weight"):
            layer.delta()
