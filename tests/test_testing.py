import pytest
import torch

from mmpeft.composition.sum import weighted_sum
from mmpeft.delta import Dense, LowRank, add, truncate
from mmpeft.testing import check_strategy


def test_a_strategy_that_keeps_the_laws_passes():
    check_strategy(weighted_sum)


def test_settings_and_a_generator_reach_the_strategy():
    seen = []

    def noting(deltas, *, strength=1.0, generator):
        seen.append((strength, generator.initial_seed()))
        return weighted_sum(deltas).scaled(strength)

    check_strategy(noting, strength=2.0)
    assert set(seen) == {(2.0, 0)}


def by_factors(deltas):
    """Add up B and A apart: what the laws are there to find."""
    factors = [(truncate(delta, rank=1)[0] if isinstance(delta, Dense) else delta, w) for delta, w in deltas]
    B, A = sum(d.lora_B[:, :1] * w for d, w in factors), sum(d.lora_A[:1] for d, _ in factors)
    return LowRank(B, A, deltas[0][0].shape)


def of_magnitudes(deltas):
    return Dense(sum(w * d.dense().abs() for d, w in deltas) * deltas[0][1])


def first_whole(deltas):
    return add([deltas[0][0].scaled(deltas[0][1]), *(d.scaled(0.5 * w) for d, w in deltas[1:])])


def at_random(deltas):
    return weighted_sum(deltas).scaled(float(torch.rand(())) + 0.5)


def in_place(deltas):
    for delta, weight in deltas:
        delta.dense().mul_(weight)
    return Dense(sum(d.dense() for d, _ in deltas))


def along_the_last_axis(deltas):
    """Scale along the last axis, which of a convolution is the kernel's."""
    change = weighted_sum(deltas).dense()
    return Dense(change * torch.linspace(1, 2, change.shape[-1]))


def in_half_precision(deltas):
    class Half(Dense):
        def dense(self):
            return self.change.half()

    return Half(weighted_sum(deltas).dense())


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (by_factors, "B/c and cA are the same change as B and A"),
        (of_magnitudes, "a lone change must scale with its weight"),
        (first_whole, "another order of the adapters must not change the result"),
        (along_the_last_axis, "a convolution must be treated as its matrix"),
        (at_random, "the same call gave two results; draw from the `generator`"),
        (in_place, "wrote into the changes that it was given"),
        (in_half_precision, "the result must be float32; got torch.float16"),
        (lambda deltas: weighted_sum(deltas).dense(), "must return a Delta; got Tensor"),
        (lambda deltas: Dense(weighted_sum(deltas).dense().flatten()), "must have the shape of the changes"),
        (lambda deltas: weighted_sum(deltas).scaled(float("nan")), "is not finite"),
    ],
)
def test_a_strategy_that_breaks_a_law_is_told_which(strategy, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_strategy(strategy)
