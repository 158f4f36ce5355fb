"""Checks that built-in plugins pass, for the authors of others to run in their own tests."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from mmpeft.delta import Delta, Dense, LowRank, matrix_shape

_SHAPES = ((6, 5), (4, 3, 3, 3), (3, 4, 1, 1), (7,))
_WEIGHTS = (1.0, 0.7, -0.5)
# Relative to the result: float32 sums, and solvers that stop when they are near.
_TOLERANCE = 1e-3

_Strategy = Callable[[Sequence[tuple[Delta, float]]], Delta]


def check_strategy(strategy: Callable[..., Delta], *, order_matters: bool = False, **settings: Any) -> None:
    """Check that a strategy keeps the laws of composition, on linear and convolution layers and vectors.

    It is called with small random changes of ranks 1 to 3 at positive and negative weights. Where it names a
    `generator`, each call is given a fresh one of one seed.

    Args:
        strategy: the function, as it is registered.
        order_matters: whether the order of the adapters is meant to count; always so where it draws at random.
        settings: the strategy's own, as a user would give them.

    Raises:
        AssertionError: a law does not hold; the message says which, for which shape and by how much.
    """
    draws = "generator" in inspect.signature(strategy).parameters

    def compose(terms: Sequence[tuple[Delta, float]]) -> Delta:
        given = {**settings, "generator": torch.Generator().manual_seed(0)} if draws else settings
        return strategy(terms, **given)

    for shape in _SHAPES:
        terms = [(_low_rank(shape, rank), weight) for rank, weight in zip((1, 2, 3), _WEIGHTS, strict=True)]
        _gives_a_change_of_the_weight(compose, terms)
        _repeats_itself(compose, terms)
        _leaves_what_it_is_given(compose, terms)
        _takes_a_lone_change_at_its_weight(compose, terms)
        _sees_changes_and_not_factors(compose, terms)
        _sees_a_convolution_as_its_matrix(compose, terms)
        if not (order_matters or draws):
            _does_not_look_at_the_order(compose, terms)


def _gives_a_change_of_the_weight(compose: _Strategy, terms: list[tuple[LowRank, float]]) -> None:
    shape = terms[0][0].shape
    for count in range(1, len(terms) + 1):
        result = compose(terms[:count])
        assert isinstance(result, Delta), f"a strategy must return a Delta; got {type(result).__name__}"
        change = result.dense()
        assert tuple(result.shape) == tuple(change.shape) == shape, (
            f"the result must have the shape of the changes, {shape}; got {tuple(change.shape)}"
        )
        assert change.dtype == torch.float32, f"the result must be float32; got {change.dtype}"
        assert torch.isfinite(change).all(), f"the result for {count} changes of shape {shape} is not finite"


def _repeats_itself(compose: _Strategy, terms: list[tuple[LowRank, float]]) -> None:
    same = torch.equal(compose(terms).dense(), compose(terms).dense())
    assert same, "the same call gave two results; draw from the `generator` parameter alone"


def _leaves_what_it_is_given(compose: _Strategy, terms: list[tuple[LowRank, float]]) -> None:
    before = [(delta.lora_B.clone(), delta.lora_A.clone()) for delta, _ in terms]
    dense = [(Dense(delta.dense()), weight) for delta, weight in terms]
    copies = [delta.change.clone() for delta, _ in dense]
    compose(terms)
    compose(dense)
    is_kept = all(
        torch.equal(delta.lora_B, B) and torch.equal(delta.lora_A, A)
        for (delta, _), (B, A) in zip(terms, before, strict=True)
    ) and all(torch.equal(delta.change, copy) for (delta, _), copy in zip(dense, copies, strict=True))
    assert is_kept, "the strategy wrote into the changes that it was given; compute on new tensors"


def _takes_a_lone_change_at_its_weight(compose: _Strategy, terms: list[tuple[LowRank, float]]) -> None:
    delta = terms[-1][0]
    _assert_close(
        compose([(delta, -2.0)]),
        compose([(delta, 1.0)]).scaled(-2.0),
        "a lone change must scale with its weight",
    )


def _sees_changes_and_not_factors(compose: _Strategy, terms: list[tuple[LowRank, float]]) -> None:
    expected = compose(terms)
    # another factor for each, and powers of two, so that no entry of a product is rounded otherwise
    gauged = [
        (LowRank(delta.lora_B / 4**i, delta.lora_A * 4**i, delta.shape), weight)
        for i, (delta, weight) in enumerate(terms, 1)
    ]
    _assert_close(
        compose(gauged), expected, "B/c and cA are the same change as B and A, for any c of each adapter"
    )
    dense = [(Dense(delta.dense()), weight) for delta, weight in terms]
    _assert_close(compose(dense), expected, "a change given as a full matrix is the same as its factors")


def _sees_a_convolution_as_its_matrix(compose: _Strategy, terms: list[tuple[LowRank, float]]) -> None:
    shape = matrix_shape(terms[0][0].shape)
    flat = [(LowRank(delta.lora_B, delta.lora_A, shape), weight) for delta, weight in terms]
    expected = Dense(compose(terms).dense().reshape(shape))
    _assert_close(compose(flat), expected, "a convolution must be treated as its matrix (out, in*kh*kw)")


def _does_not_look_at_the_order(compose: _Strategy, terms: list[tuple[LowRank, float]]) -> None:
    law = (
        "another order of the adapters must not change the result (pass order_matters=True if it is meant to)"
    )
    _assert_close(compose(terms[::-1]), compose(terms), law)


def _assert_close(result: Delta, expected: Delta, law: str) -> None:
    distance, norm = float((result.dense() - expected.dense()).norm()), expected.norm()
    assert distance <= _TOLERANCE * norm, (
        f"{law}; for shape {expected.shape} the results differ by {distance:.3g} at a norm of {norm:.3g}"
    )


def _low_rank(shape: tuple[int, ...], rank: int) -> LowRank:
    generator = torch.Generator().manual_seed(rank)
    B = torch.randn(shape[0], rank, generator=generator)
    A = torch.randn(rank, prod(shape[1:]), generator=generator)
    return LowRank(B, A, shape)
