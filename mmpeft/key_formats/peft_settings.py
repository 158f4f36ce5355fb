"""The configuration of PEFT's LoHa, LoKr, OFT and (IA)³: what the tensors of an adapter need beside them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from packaging.version import InvalidVersion, Version

from mmpeft.errors import FormatError, MethodError
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.ia3 import Ia3Layer
from mmpeft.methods.loha import LohaLayer
from mmpeft.methods.lokr import LokrLayer
from mmpeft.methods.oft import InputOftLayer

_TYPES: dict[type[LayerAdapter], str] = {
    LohaLayer: "LOHA",
    LokrLayer: "LOKR",
    InputOftLayer: "OFT",
    Ia3Layer: "IA3",
}
# The series that PEFT has in place of the inverse was another one before.
NEUMANN_SINCE = "0.18.0"
_NUMBERS = ("r", "lora_alpha", "alpha", "eps", "num_cayley_neumann_terms")
# A repeated group that ends in a repetition, "(a+)+", takes exponential time on names that it does not match.
_NESTED_REPETITION = re.compile(r"[*+}]\)+[*+{]")


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose values are of another kind than PEFT's, before any of them is used.

    Raises:
        FormatError: naming the first of them.
    """
    for name in _NUMBERS:
        if name in config:
            _expect(_is_number(config[name]), name, "a number", config[name])
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        _expect(isinstance(patterns, Mapping), name, "a table", patterns)
        for pattern, value in patterns.items():
            _expect(_is_number(value), f"{name} {pattern!r}", "a number", value)
            _expect(_is_safe(pattern), name, "a regular expression without nested repetitions", pattern)
    modules = config.get("feedforward_modules") or []
    fits = (
        _is_safe(modules)
        if isinstance(modules, str)
        else isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    )
    _expect(fits, "feedforward_modules", "a list of names or a regular expression", modules)
    version = config.get("peft_version")
    _expect(version is None or _is_version(version), "peft_version", "a version", version)
    mapping, kind = config.get("auto_mapping") or {}, config.get("peft_type", "")
    _expect(isinstance(mapping, Mapping), "auto_mapping", "a table", mapping)
    _expect(isinstance(kind, str | None), "peft_type", "a name", kind)


def _expect(fits: bool, name: str, needed: str, value: Any) -> None:
    if not fits:
        raise FormatError(f"the settings have {name} = {str(value)[:80]!r}; {needed} is needed")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_version(text: Any) -> bool:
    try:
        return isinstance(text, str) and bool(Version(text.partition("@")[0]))
    except InvalidVersion:
        return False


def _is_safe(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return not _NESTED_REPETITION.search(pattern)


def peft_config_of(layers: Mapping[str, LayerAdapter]) -> dict[str, Any]:
    """State the configuration that one component's layers have in common; biases' layers ("x.bias") are passed over.

    Args:
        layers: by the names that the layers have in the file.

    Raises:
        MethodError: several methods, or settings that PEFT knows once for a whole adapter and that differ.
    """
    weights = {name: layer for name, layer in layers.items() if not name.endswith(".bias")}
    types = sorted({peft_type_of(layer) for layer in weights.values()})
    if len(types) != 1:
        raise MethodError(
            f"PEFT holds one method in an adapter; this one has {', '.join(types) or 'no layer'}"
        )
    config: dict[str, Any] = {"peft_type": types[0], "target_modules": sorted(weights)}
    if types[0] == "IA3":
        inputs = [n for n, layer in weights.items() if isinstance(layer, Ia3Layer) and layer.side == "input"]
        return {**config, "feedforward_modules": _whole_names(inputs)}
    if types[0] == "OFT":
        return {**config, **_oft_config(list(weights.values()))}
    return {
        **config,
        **_ranks(weights),
        **(_factorization(weights) if types[0] == "LOKR" else _effective(weights)),
    }


def peft_type_of(layer: LayerAdapter | None) -> str:
    """Give the configuration's name of a layer's method.

    Raises:
        MethodError: it has no form in PEFT's files beside LoRA's.
    """
    if layer is None or type(layer) not in _TYPES:
        form = layer.method if layer is not None else "a bias alone"
        raise MethodError(
            f"PEFT's files have no form for {form} as it is here; they hold LoRA, DoRA, LoHa, LoKr, OFT of inputs and "
            f"(IA)³; export the adapter in LyCORIS's form"
        )
    return _TYPES[type(layer)]


def rank_and_alpha(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Give a layer's rank and alpha from the configuration, as PEFT resolves them."""
    rank = _resolve(config.get("rank_pattern") or {}, name, config.get("r", 8))
    alpha = _resolve(config.get("alpha_pattern") or {}, name, config.get("alpha", 8))
    return int(rank), float(alpha)


def _resolve(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _oft_config(layers: Sequence[LayerAdapter]) -> dict[str, Any]:
    found = [layer for layer in layers if isinstance(layer, InputOftLayer)]
    settings = {(o.block_size, o.neumann_terms, o.block_share, o.coft_eps) for o in found}
    if len(settings) > 1:
        raise MethodError(
            "PEFT knows one block size and one kind of rotation for a whole OFT adapter; these differ"
        )
    size, terms, shared, eps = settings.pop()
    config: dict[str, Any] = {"r": 0, "oft_block_size": size, "block_share": shared, "coft": eps is not None}
    if eps is not None:
        config["eps"] = eps
    # a version is needed beside the series, for PEFT to believe that it is today's
    series = {"num_cayley_neumann_terms": terms, "peft_version": NEUMANN_SINCE} if terms else {}
    return {**config, "use_cayley_neumann": bool(terms), **series}


def _ranks(layers: Mapping[str, LayerAdapter]) -> dict[str, Any]:
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        assert isinstance(layer, LohaLayer | LokrLayer)
        rank = layer.rank
        if rank is None:
            assert isinstance(layer, LokrLayer)
            # any rank that is too high to be low-rank gives whole halves
            rank = layer.settings_rank or max(layer.second_shape[:2])
        ranks[name], alphas[name] = rank, layer.scale * rank
    rank = Counter(sorted(ranks.values())).most_common(1)[0][0]
    alpha = Counter(sorted(alphas.values())).most_common(1)[0][0]
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {_whole_name(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_whole_name(name): value for name, value in alphas.items() if value != alpha},
    }


def _effective(layers: Mapping[str, LayerAdapter]) -> dict[str, Any]:
    cores = {
        name: any(part.endswith(("_t1", "_t2")) for part in layer.tensors) for name, layer in layers.items()
    }
    for name, layer in layers.items():
        if any(cores.values()) and not cores[name] and any(side != 1 for side in layer.shape[2:]):
            raise MethodError(
                f"PEFT has Tucker cores in all convolutions or in none; {name} has none, others have"
            )
    return {"use_effective_conv2d": any(cores.values())}


def _factorization(layers: Mapping[str, LayerAdapter]) -> dict[str, Any]:
    """Find the settings from which PEFT makes halves of just these shapes."""
    from peft.tuners.lokr.layer import factorization

    found = [layer for layer in layers.values() if isinstance(layer, LokrLayer)]
    firsts = sorted({side for layer in found for side in layer.first_shape})
    for factor in (-1, *firsts):
        for both in (False, True):
            if all(_is_made_by(layer, factor, both, factorization) for layer in found):
                config = {"decompose_factor": factor, "decompose_both": both}
                whole = {n: layer for n, layer in layers.items() if "lokr_w2" not in layer.tensors}
                return {**config, **_effective(whole)}
    raise MethodError(
        "PEFT splits every layer by one rule, which does not give the halves of this LoKr; export it in LyCORIS's form"
    )


def _is_made_by(
    layer: LokrLayer, factor: int, both: bool, factorization: Callable[[int, int], tuple[int, int]]
) -> bool:
    (a, c), (b, d) = layer.first_shape, layer.second_shape[:2]
    d = layer.shape[1] // c if len(layer.shape) > 2 else d
    rank = layer.rank or layer.settings_rank or max(b, d)
    return (
        factorization(a * b, factor) == (a, b)
        and factorization(c * d, factor) == (c, d)
        and (layer.lokr_w1 is None) == (both and rank < max(a, c) / 2)
        and (layer.lokr_w2 is None) == (rank < max(b, d) / 2)
    )


def _whole_name(name: str) -> str:
    return "^" + re.escape(name)


def _whole_names(names: Sequence[str]) -> str | list[str]:
    return "|".join(map(re.escape, sorted(names))) if names else []
