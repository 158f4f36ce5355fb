import pytest
import torch

from mmpeft.delta import Dense, LowRank
from mmpeft.methods.loha import LohaLayer


def layer(out=4, inputs=6, rank=2, kernel=(), dtype=torch.float32, **settings):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    if kernel:
        a, b, core = (rank, out), (rank, inputs), (rank, rank, *kernel)
        cores = {"hada_t1": draw(*core), "hada_t2": draw(*core)}
    else:
        a, b, cores = (out, rank), (rank, inputs), {}
    return LohaLayer(draw(*a), draw(*b), draw(*a), draw(*b), 3.0, **cores, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_is_the_product_of_two_low_rank_ones(dtype):
    loha = layer(dtype=dtype)
    halves = [
        a.float() @ b.float() for a, b in (list(loha.tensors.values())[:2], list(loha.tensors.values())[2:])
    ]
    torch.testing.assert_close(loha.dense(), 1.5 * halves[0] * halves[1])


def test_cores_make_the_kernel():
    loha = layer(kernel=(3, 3))
    assert loha.shape == loha.delta().shape == (4, 6, 3, 3)
    halves = [
        torch.einsum("mo,mnhw,ni->oihw", a, t, b)
        for a, t, b in (
            (loha.hada_w1_a, loha.hada_t1, loha.hada_w1_b),
            (loha.hada_w2_a, loha.hada_t2, loha.hada_w2_b),
        )
    ]
    torch.testing.assert_close(loha.dense(), 1.5 * halves[0] * halves[1])


def test_the_shorter_of_two_exact_forms_is_taken():
    wide, narrow = layer(40, 60).delta(), layer(4, 6).delta()
    assert isinstance(wide, LowRank)
    assert wide.rank == 4
    assert isinstance(narrow, Dense)


def test_a_known_shape_is_no_part_of_what_the_adapter_is():
    plain, placed = layer(4, 54), layer(4, 54, weight_shape=(4, 6, 3, 3))
    assert (plain.shape, placed.shape) == ((4, 54), (4, 6, 3, 3))
    assert plain.settings == placed.settings == {"alpha": 3.0}
    assert torch.equal(plain.dense().reshape(4, 6, 3, 3), placed.dense())
