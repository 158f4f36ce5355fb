import torch

from mmpeft.delta import LowRank
from mmpeft.methods.glora import GloraLayer


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_change_has_a_term_with_the_weight_and_one_without():
    a1, a2, b1, b2, weight = draw(6, 2), draw(2, 6), draw(4, 2), draw(2, 6), draw(4, 6)
    delta = GloraLayer(a1, a2, b1, b2, 3.0).delta(weight)
    torch.testing.assert_close(delta.dense(), 1.5 * (weight @ a1 @ a2 + b1 @ b2))
    torch.testing.assert_close(
        GloraLayer(a1, a2, b1, b2, 3.0, rslora=True).dense(weight), 2**0.5 * delta.dense()
    )


def test_it_stays_low_rank_where_that_is_shorter():
    layer = GloraLayer(draw(60, 2), draw(2, 60), draw(40, 2), draw(2, 60), 3.0)
    delta = layer.delta(draw(40, 60))
    assert isinstance(delta, LowRank)
    assert delta.rank == 4


def test_a_core_makes_the_kernel_of_the_free_term():
    a1, a2, b1, b2 = draw(6, 2, 1, 1), draw(2, 6, 1, 1), draw(4, 2, 1, 1), draw(2, 6, 1, 1)
    core, weight = draw(2, 2, 3, 3), draw(4, 6, 3, 3)
    layer = GloraLayer(a1, a2, b1, b2, 2.0, bm=core)
    assert layer.shape == (4, 6, 3, 3)
    inputs = a1[:, :, 0, 0] @ a2[:, :, 0, 0]
    expected = torch.einsum("oihw,ij->ojhw", weight, inputs)
    expected += torch.einsum("om,mnhw,ni->oihw", b1[:, :, 0, 0], core, b2[:, :, 0, 0])
    torch.testing.assert_close(layer.dense(weight), expected)
