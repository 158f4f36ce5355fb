"""PEFT's other methods: the tensors of LoHa, LoKr, OFT and (IA)³; both directions.

Where they differ from LyCORIS's of the same name: a LoKr of two whole halves is scaled by alpha/rank too; OFT turns
inputs; (IA)³ saves multipliers, and those of outputs count for the bias too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from packaging.version import Version
from torch import Tensor

from mmpeft.errors import FormatError, MethodError
from mmpeft.key_formats import lycoris
from mmpeft.key_formats.peft_settings import NEUMANN_SINCE, peft_type_of, rank_and_alpha
from mmpeft.layer_adapter import LayerAdapter, shapes_agree
from mmpeft.methods.ia3 import Ia3Layer
from mmpeft.methods.loha import LohaLayer
from mmpeft.methods.lokr import LokrLayer
from mmpeft.methods.oft import InputOftLayer

Shape = tuple[int, ...]
Config = Mapping[str, Any]

# endings of the keys of each method's tensors, without the dot
ENDINGS: dict[str, tuple[str, ...]] = {
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "OFT": ("oft_R.weight",),
    "IA3": ("ia3_l",),
}


def peft_layer_from(
    peft_type: str,
    config: Config,
    name: str,
    parts: Mapping[str, Tensor],
    shape: Shape | None,
    bias_shape: Shape | None = None,
) -> dict[str, LayerAdapter]:
    """Build the layer adapters of one layer from its tensors.

    Args:
        peft_type: of the configuration: LOHA, LOKR, OFT or IA3.
        config: adapter_config.json.
        name: the layer's in the file, on which the configuration's patterns are matched.
        parts: the tensors by the ending of their keys, as in `ENDINGS`.
        shape: of the base's weight where it is known.
        bias_shape: of the base's bias where it is known to have one; only (IA)³ changes it.

    Returns:
        "": the weight's, "bias": the bias's where it changes.

    Raises:
        FormatError: a tensor that is missing or none of the method's, shapes or ranks that do not fit, settings whose
            effect the tensors do not hold, or an (IA)³ of outputs without its base, whose biases it changes.
    """
    if peft_type not in ENDINGS:
        raise FormatError(f"PEFT's {peft_type} cannot be read; LORA, {', '.join(ENDINGS)} can")
    if strange := sorted(parts.keys() - set(ENDINGS[peft_type])):
        raise FormatError(f"{name} has {strange[0]!r}, which is no tensor of {peft_type}")
    if config.get("bias", "none") != "none" or config.get("fan_in_fan_out"):
        raise FormatError(
            "this PEFT adapter cannot be read: it trains biases, or its base stores weights transposed"
        )
    if peft_type == "IA3":
        return _ia3(config, name, parts, shape, bias_shape)
    return {"": _BUILDERS[peft_type](config, name, parts, shape)}


def peft_parts_of(weight: LayerAdapter | None, bias: LayerAdapter | None = None) -> dict[str, Tensor]:
    """Give one layer's tensors by the ending of their keys, as in `ENDINGS`; `peft_layer_from` reads them back.

    Raises:
        MethodError: the layer has no form in PEFT's files beside LoRA's, or a bias changes otherwise than its weight.
    """
    peft_type_of(weight)
    if bias is not None and not _same_multipliers(weight, bias):
        raise MethodError(
            "PEFT has no form for a bias's change of its own; export the adapter in LyCORIS's form"
        )
    match weight:
        case Ia3Layer(side="output", is_difference=True) if bias is None:
            raise MethodError(
                "PEFT's (IA)³ multiplies biases together with their outputs, and this one leaves them; export the "
                "adapter in LyCORIS's form"
            )
        case Ia3Layer():
            multipliers = weight.scaling.float() + 1 if weight.is_difference else weight.scaling
            if weight.scaling.ndim > 2:
                return {"ia3_l": multipliers}
            return {"ia3_l": multipliers.reshape((-1, 1) if weight.side == "output" else (1, -1))}
        case InputOftLayer():
            return {"oft_R.weight": weight.oft_R}
    assert weight is not None
    return weight.tensors


def _loha(config: Config, name: str, parts: Mapping[str, Tensor], shape: Shape | None) -> LayerAdapter:
    layer = lycoris.layer_from(name, parts, shape)[""]
    assert isinstance(layer, LohaLayer)
    rank, alpha = rank_and_alpha(config, name)
    _check_rank(name, layer.rank, rank)
    return replace(layer, alpha=alpha)


def _lokr(config: Config, name: str, parts: Mapping[str, Tensor], shape: Shape | None) -> LayerAdapter:
    layer = lycoris.layer_from(name, parts, shape)[""]
    assert isinstance(layer, LokrLayer)
    rank, alpha = rank_and_alpha(config, name)
    if layer.rank is not None:
        _check_rank(name, layer.rank, rank)
        return replace(layer, alpha=alpha)
    return replace(layer, alpha=alpha, settings_rank=rank)


def _oft(config: Config, name: str, parts: Mapping[str, Tensor], shape: Shape | None) -> LayerAdapter:
    oft_R = parts.get("oft_R.weight")
    if oft_R is None:
        raise FormatError(
            f"{name} has no oft_R.weight; before PEFT 0.16, OFT was saved otherwise and cannot be read"
        )
    uses_series = config.get("use_cayley_neumann", True)
    version = str(config.get("peft_version") or "0").partition("@")[0]
    if uses_series and Version(version) < Version(NEUMANN_SINCE):
        raise FormatError(
            f"this OFT was trained by a PEFT before {NEUMANN_SINCE}, whose series is another one; PEFT cannot read it "
            f"either, train it again"
        )
    shared = bool(config.get("block_share", False))
    terms = max(1, int(config.get("num_cayley_neumann_terms", 5))) if uses_series else 0
    eps = float(config.get("eps", 6e-5)) if config.get("coft") else None
    if oft_R.ndim != 2 or (shared and len(oft_R) != 1):
        raise FormatError(f"{name} has oft_R.weight {tuple(oft_R.shape)}; (blocks, entries) is needed")
    told = InputOftLayer(oft_R, terms, shared, eps)
    size = told.block_size
    if size * (size - 1) // 2 != oft_R.shape[1]:
        raise FormatError(
            f"{name} has {oft_R.shape[1]} entries a block, which fill no triangle above a diagonal"
        )
    if shape is None or not shapes_agree(told.shape, shape):
        return told
    return replace(told, weight_shape=shape)


def _ia3(
    config: Config, name: str, parts: Mapping[str, Tensor], shape: Shape | None, bias_shape: Shape | None
) -> dict[str, LayerAdapter]:
    multipliers = parts.get("ia3_l")
    if multipliers is None:
        raise FormatError(f"{name} has no ia3_l")
    is_input = _matches(config.get("feedforward_modules") or [], name)
    count = multipliers.numel()
    expected = (1, count, *[1] * (multipliers.ndim - 2)) if is_input or multipliers.ndim > 2 else (count, 1)
    if multipliers.ndim < 2 or tuple(multipliers.shape) != expected:
        side = "inputs" if is_input else "outputs"
        raise FormatError(
            f"{name} multiplies {side}, so ia3_l must be {expected}; got {tuple(multipliers.shape)}"
        )
    layer = Ia3Layer(multipliers, "input" if is_input else "output")
    if shape is not None and shapes_agree(layer.shape, shape):
        layer = replace(layer, weight_shape=shape)
    if is_input:
        return {"": layer}
    if shape is None:
        raise FormatError("PEFT's (IA)³ changes the biases too, which the file does not tell; give the base")
    if bias_shape is None:
        return {"": layer}
    return {"": layer, "bias": Ia3Layer(multipliers, "output", weight_shape=(count,))}


_BUILDERS: dict[str, Callable[[Config, str, Mapping[str, Tensor], Shape | None], LayerAdapter]] = {
    "LOHA": _loha,
    "LOKR": _lokr,
    "OFT": _oft,
}


def _matches(modules: str | Sequence[str], name: str) -> bool:
    # as PEFT does it: a string is a regular expression for the whole name, a list is of endings
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name.endswith(module) for module in modules)


def _check_rank(name: str, rank: int, stated: int) -> None:
    if rank != stated:
        raise FormatError(f"{name} has rank {rank}, but the file's settings say {stated}")


def _same_multipliers(weight: LayerAdapter | None, bias: LayerAdapter) -> bool:
    return (
        isinstance(weight, Ia3Layer)
        and isinstance(bias, Ia3Layer)
        and weight.side == bias.side == "output"
        and weight.is_difference == bias.is_difference
        and bool((weight.scaling.flatten() == bias.scaling.flatten()).all())
    )
