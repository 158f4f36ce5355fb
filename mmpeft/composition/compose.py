"""Compose adapters into a new one: layer by layer on the changes of the weights, never on the factors apart.

A strategy is a plain typed function on one layer: `def mine(deltas: Sequence[tuple[Delta, float]], *, density: float =
0.5) -> Delta`. The changes come unweighted, with their weights, which are never 0. Keyword-only parameters are its
settings: each has a type, a default and a line in the docstring's Args. One called `generator` gets a torch.Generator
seeded from (seed, layer name); one called `rank`, `error` or `energy` gets what was asked for, while the results of
strategies without them are truncated afterwards. It must stand a single change, and the order of changes only matters
where its docstring says so; `mmpeft.testing.check_strategy` tries these laws.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpeft import low_rank
from mmpeft.adapter import Adapter, load_adapter
from mmpeft.composition import lineage
from mmpeft.composition.parents import Parents
from mmpeft.composition.report import CompositionReport, Errors, loss_sentence
from mmpeft.composition.strategy import Strategy
from mmpeft.delta import Delta, LowRank, decompose, inner, truncate
from mmpeft.errors import AdapterError, ConfigError, MethodError
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.full import FullLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.mix import Weight

Weighted = tuple[Adapter | str | Path, float | Mapping[str, Any] | Weight]

# What a person should hear of: below this share a truncation is lost in the noise of the adapters' training.
_LOSS_WORTH_SAYING = 0.05


class DifferentBasesWarning(UserWarning):
    """Adapters of different fine-tunes of one base were composed."""


def compose(
    adapters: Sequence[Weighted],
    strategy: str = "sum",
    *,
    rank: int | None = None,
    error: float | None = None,
    seed: int = 0,
    base: Any = None,
    **settings: Any,
) -> tuple[Adapter, CompositionReport]:
    """Compose adapters into a new adapter with a strategy.

    A result that is low-rank becomes LoRA of the rank found, alpha = rank, in float32; every other one a full
    difference. A layer whose weights are all 0 stays, with a change of zero. Memory is bounded by one layer beside the
    adapters and the result.

    Args:
        adapters: (adapter or path, weight) pairs; a weight is a number, or factors per component or block as
            `Weight.of` takes them, or a `Weight` that does not vary.
        strategy: sum, svd, ties, dare, dare_ties, magnitude, slerp, knots, orthogonal, zip, or a plugin's.
        rank: the most that a layer's rank may be.
        error: the largest relative Frobenius error of a layer, in [0, 1], at which its rank is chosen.
        seed: of strategies that draw; each layer's draws are a function of (seed, layer name).
        base: the base's folder, pipeline, module, or modules by component; for methods whose change depends on it.
        settings: the strategy's own.

    Returns:
        The new adapter, whose card tells its parents and how to make it again, and what the composition cost.

    Raises:
        ConfigError: an unknown strategy or setting, a value out of range, or a weight that varies.
        AdapterError: an adapter cannot be read, or needs the base's weights.
        BaseMismatch: the adapters belong to different bases, or do not fit `base`.
        MethodError: an adapter's method is no change of weights.
    """
    started = time.perf_counter()
    chosen = Strategy.of(strategy, settings, rank=rank, error=error)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed: must be a whole number; got {seed!r}")
    given, weights = _pairs(adapters)
    parents = Parents(given, base)
    for title, weight in zip(parents.titles, weights, strict=True):
        _check_weight(title, weight, parents.known_layers)
    remarks = [sentence for sentence in [parents.check_bases()] if sentence]
    for sentence in remarks:
        warnings.warn(sentence, DifferentBasesWarning, stacklevel=2)
    with torch.no_grad():
        pieces = {layer: _compose_layer(parents, weights, chosen, layer, seed) for layer in parents.layers}
    adapter = Adapter(
        {layer: piece.layer_adapter for layer, piece in pieces.items()},
        lineage.card(parents, weights, {"compose": {**chosen.as_dict(), "seed": seed}}),
    )
    report = CompositionReport(
        strategy=strategy,
        adapters=len(parents),
        error=Errors.of({layer: (piece.error, piece.norm) for layer, piece in pieces.items()}),
        ranks={layer: getattr(piece.layer_adapter, "rank", None) for layer, piece in pieces.items()},
        warnings=(*remarks, *_sentences(chosen, pieces)),
        seconds=time.perf_counter() - started,
    )
    return adapter, report


def replay(
    like: Adapter | str | Path, adapters: Sequence[Adapter | str | Path], *, base: Any = None
) -> tuple[Adapter, CompositionReport]:
    """Compose again as a composed adapter was: its card tells strategy, settings, weights and parents.

    The same versions give the same bytes; the report says where the result is another.

    Args:
        like: the composed adapter.
        adapters: its parents in any order; they are known by their digests.
        base: as for `compose`.

    Raises:
        AdapterError: `like` was not composed, a parent is missing, or one too many was given.
        ConfigError, BaseMismatch, MethodError: as `compose` does.
    """
    model = like if isinstance(like, Adapter) else load_adapter(like)
    title = "this adapter" if isinstance(like, Adapter) else str(like)
    recipe = model.card.recipe.get("compose")
    if not recipe or not model.card.parents:
        raise AdapterError(f"{title} was not composed: its card names no parents")
    opened = Parents(adapters, base)
    by_digest = {adapter.digest: adapter for adapter in opened}
    wanted = [str(parent.get("digest")) for parent in model.card.parents]
    missing = [
        lineage.describe(parent) for parent in model.card.parents if parent.get("digest") not in by_digest
    ]
    if missing:
        raise AdapterError(
            f"{title} has {len(wanted)} parents, and {len(missing)} of them are not among what was given: "
            f"{'; '.join(missing)}"
        )
    for name, adapter in zip(opened.titles, opened, strict=True):
        if adapter.digest not in wanted:
            raise AdapterError(f"{name} is no parent of {title}; leave it out")
    try:
        pairs = [(by_digest[str(p["digest"])], lineage.weight_of(p["weight"])) for p in model.card.parents]
        settings = {key: recipe[key] for key in ("strategy", "rank", "error", "seed")} | recipe["settings"]
    except (KeyError, TypeError) as error:
        raise AdapterError(f"{title} does not tell how it was composed: its card lacks {error}") from error
    adapter, report = compose(pairs, base=base, **settings)
    if adapter.digest != model.digest:
        made = ", ".join(f"{name} {number}" for name, number in model.card.versions.items())
        sentence = (
            f"the result is not byte for byte {title}, which was made with {made or 'versions unknown'}"
        )
        report = replace(report, warnings=(*report.warnings, sentence))
    return adapter, report


@dataclass(frozen=True)
class _Piece:
    """One layer's result: what it lost of how much, and what it would lose at higher ranks."""

    layer_adapter: LayerAdapter
    error: float = 0.0
    norm: float = 0.0
    errors_at: Mapping[int, float] | None = None
    was_low_rank: bool = True


def _compose_layer(
    parents: Parents, weights: Sequence[Weight], strategy: Strategy, layer: str, seed: int
) -> _Piece:
    shape = parents.shape(layer)
    factors = [(number, weight.at(layer)) for number, weight in enumerate(weights)]
    deltas = [
        (delta, factor)
        for number, factor in factors
        if factor and (delta := parents.delta(number, layer)) is not None
    ]
    if not deltas:
        return _Piece(_zero(shape))
    try:
        given = strategy.untruncated(deltas, layer, seed)
        norm = given.norm()
        kept, lost, errors_at = given, 0.0, None
        if strategy.truncates and len(shape) > 1 and norm:
            kept, lost, errors_at = _truncated(given, norm, strategy, deltas, layer, seed)
    except MethodError as error:
        raise MethodError(f"{layer}: {error}") from error
    for tensor in (kept.lora_B, kept.lora_A) if isinstance(kept, LowRank) else (kept.dense(),):
        if not torch.isfinite(tensor).all():
            raise MethodError(
                f"{strategy.name} gave numbers that are not finite at {layer}; try smaller weights"
            )
    return _Piece(_layer_adapter(kept, shape), lost, norm, errors_at, isinstance(given, LowRank))


def _truncated(
    given: Delta,
    norm: float,
    strategy: Strategy,
    deltas: Sequence[tuple[Delta, float]],
    layer: str,
    seed: int,
) -> tuple[Delta, float, dict[int, float] | None]:
    """Give what is kept, its error, and the least errors at one, two and four times the rank that was asked for."""
    rank = strategy.rank
    if strategy.truncates_itself:
        kept = strategy(deltas, layer, seed)
        if strategy.left_to_truncate:
            kept, _ = truncate(kept, **strategy.left_to_truncate)
        apart = norm**2 - 2 * inner(given, kept) + kept.norm() ** 2
        error = max(apart, 0.0) ** 0.5 / norm
        singular = low_rank.relative_errors(decompose(given, 1)[1])
        at = None if rank is None else {each: float(singular[each:][:1].sum()) for each in _looked_at(rank)}
        return kept, error, at
    if rank is None:
        kept, error = truncate(given, error=strategy.error)
        return kept, error, None
    # the only decomposition of what may be dense: lower ranks are its first columns
    wide, beyond = truncate(given, rank=max(_looked_at(rank)), error=strategy.error)
    shares = (wide.lora_B.double().norm(dim=0) * wide.lora_A.double().norm(dim=1) / norm) ** 2
    at = {each: float((shares[each:].sum() + beyond**2).sqrt()) for each in _looked_at(rank)}
    return LowRank(wide.lora_B[:, :rank], wide.lora_A[:rank], wide.shape), at[rank], at


def _looked_at(rank: int) -> tuple[int, int, int]:
    return rank, 2 * rank, 4 * rank


def _layer_adapter(kept: Delta, shape: tuple[int, ...]) -> LayerAdapter:
    if not isinstance(kept, LowRank) or len(shape) < 2:
        return FullLayer(kept.dense().reshape(shape).clone(memory_format=torch.contiguous_format))
    B, A = _balanced(kept.lora_B, kept.lora_A)
    ones = (1,) * (len(shape) - 2)
    return LoraLayer(
        A.reshape(kept.rank, *shape[1:]).contiguous(),
        B.reshape(shape[0], kept.rank, *ones).contiguous(),
        float(kept.rank),
    )


def _balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Give both factors of each rank nearly the same length, by powers of two, which round nothing."""
    tiny = torch.finfo(torch.float32).tiny
    # float64: squares of entries above 1e19 do not fit into float32
    lengths_B, lengths_A = B.double().norm(dim=0), A.double().norm(dim=1)
    is_something = (lengths_B > tiny) & (lengths_A > tiny)
    exponents = (torch.log2(lengths_A.clamp(min=tiny)) - torch.log2(lengths_B.clamp(min=tiny))) / 2
    factors = torch.exp2(torch.where(is_something, exponents, 0.0).round()).float()
    return B * factors, A / factors[:, None]


def _zero(shape: tuple[int, ...]) -> LayerAdapter:
    if len(shape) < 2:
        return FullLayer(torch.zeros(shape))
    rest = (1,) * (len(shape) - 2)
    return LoraLayer(torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *rest), 1.0)


def _pairs(adapters: Sequence[Weighted]) -> tuple[list[Adapter | str | Path], list[Weight]]:
    if not adapters:
        raise ConfigError("nothing to compose: give at least one (adapter, weight) pair")
    for pair in adapters:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ConfigError(
                f"give (adapter or path, weight) pairs; got {type(pair).__name__} {str(pair)[:80]!r}"
            )
    given, weights = [], []
    for number, (adapter, weight) in enumerate(adapters, 1):
        title = f"adapter {number}" if isinstance(adapter, Adapter) else str(adapter)
        try:
            weights.append(Weight.of(weight))
        except ConfigError as error:
            raise ConfigError(f"the weight of {title}: {error}") from error
        given.append(adapter)
    return given, weights


def _check_weight(title: str, weight: Weight, layers: Collection[str]) -> None:
    if weight.varies:
        raise ConfigError(
            f"the weight of {title} varies with time, place, sample or branch, and a composed adapter is one set of "
            "numbers; give a number or numbers per block, or mix live with a bank"
        )
    try:
        weight.check(layers)
    except ConfigError as error:
        raise ConfigError(f"the weight of {title}: {error}") from error


def _sentences(strategy: Strategy, pieces: Mapping[str, _Piece]) -> Iterable[str]:
    sized = {layer: piece for layer, piece in pieces.items() if piece.errors_at is not None}
    if sized:
        ranks = next(iter(sized.values())).errors_at or {}
        at = {
            rank: Errors.of({n: ((p.errors_at or {})[rank], p.norm) for n, p in sized.items()})
            for rank in ranks
        }
        if next(iter(at.values())) > _LOSS_WORTH_SAYING:
            yield loss_sentence(strategy.name, all(piece.was_low_rank for piece in sized.values()), at)
    full = [
        piece.layer_adapter
        for piece in pieces.values()
        if isinstance(piece.layer_adapter, FullLayer) and len(piece.layer_adapter.shape) > 1
    ]
    if full:
        megabytes = sum(layer.diff.numel() * 4 for layer in full) / 1e6
        yield (
            f"{len(full)} layers are full differences, {megabytes:,.1f} MB, which plain diffusers and PEFT do not "
            "load; give a rank or an error to get LoRA"
        )
