import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.composition.orthogonal import orthogonal
from mmpeft.composition.sum import weighted_sum
from mmpeft.delta import Dense, LowRank, add, inner
from mmpeft.errors import ConfigError


def rest(terms, **settings):
    """What the last change is reduced to."""
    return add([orthogonal(terms, **settings), orthogonal(terms[:-1], **settings).scaled(-1.0)])


@given(st.integers(0, 20), st.integers(1, 3), st.sampled_from([(12, 9), (8, 2, 3, 3)]))
def test_the_later_change_loses_exactly_what_lies_in_the_earlier_spaces(low_rank, seed, rank, shape):
    first, second = low_rank(shape, 2, seed), low_rank(shape, 1, seed + 100)
    later = low_rank(shape, rank, seed + 200)
    result = orthogonal([(first, 1.0), (second, 0.5), (later, -0.7)], share=1.0)
    assert isinstance(result, LowRank)
    left = rest([(first, 1.0), (second, 0.5), (later, -0.7)], share=1.0)
    outputs = torch.linalg.qr(torch.cat([first.lora_B, second.lora_B], 1).double()).Q
    inputs = torch.linalg.qr(torch.cat([first.lora_A, second.lora_A]).double().T).Q
    matrix = later.lora_B.double() @ later.lora_A.double()
    expected = -0.7 * (matrix - outputs @ outputs.T @ matrix @ inputs @ inputs.T)
    torch.testing.assert_close(left.dense().double().reshape(matrix.shape), expected, rtol=1e-4, atol=1e-4)
    for earlier in (first, second):
        assert abs(inner(left, earlier)) < 1e-5 * earlier.norm() * later.norm()


def test_the_same_adapter_again_adds_nothing(low_rank):
    one = low_rank((10, 8), 3, 0)
    again = LowRank(one.lora_B * 2, one.lora_A / 2, one.shape)
    result = orthogonal([(one, 0.8), (again, 1.0)], share=1.0)
    torch.testing.assert_close(result.dense(), 0.8 * one.dense(), rtol=1e-5, atol=1e-5)


def test_the_first_change_stays_whole_and_the_order_matters(low_rank):
    one, other = low_rank((6, 5), 2, 0), low_rank((6, 5), 2, 1)
    forward, backward = (
        orthogonal(terms) for terms in ([(one, 1.0), (other, 1.0)], [(other, 1.0), (one, 1.0)])
    )
    assert not torch.allclose(forward.dense(), backward.dense(), atol=1e-2)
    torch.testing.assert_close(orthogonal([(one, 0.5)]).dense(), 0.5 * one.dense())


def test_changes_that_share_only_inputs_or_only_outputs_stay():
    reads, writes = torch.eye(6)[:2], torch.eye(5)[:, :2]
    first = LowRank(writes, reads, (5, 6))
    same_inputs = LowRank(torch.eye(5)[:, 2:4], reads, (5, 6))
    same_outputs = LowRank(writes, torch.eye(6)[2:4], (5, 6))
    for later in (same_inputs, same_outputs):
        terms = [(first, 1.0), (later, 0.7)]
        torch.testing.assert_close(orthogonal(terms).dense(), weighted_sum(terms).dense())


def test_vectors_lose_their_part_along_earlier_ones():
    one, other = Dense(torch.tensor([2.0, 0.0, 0.0])), Dense(torch.tensor([3.0, 4.0, 0.0]))
    torch.testing.assert_close(orthogonal([(one, 1.0), (other, 0.5)]).dense(), torch.tensor([2.0, 2.0, 0.0]))


def test_a_smaller_share_takes_only_the_strongest_directions():
    scales = torch.tensor([10.0, 1.0, 0.5])
    first = LowRank(torch.eye(5)[:, :3] * scales, torch.eye(6)[:3], (5, 6))
    later = LowRank(torch.eye(5)[:, :3], torch.eye(6)[:3], (5, 6))
    left = rest([(first, 1.0), (later, 1.0)], share=0.95).dense()
    torch.testing.assert_close(left.diagonal(), torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(low_rank, share):
    with pytest.raises(ConfigError, match="share: must be a share above 0 and at most 1"):
        orthogonal([(low_rank((4, 3), 1, 0), 1.0)], share=share)
