"""LyCORIS's and kohya's tensors of one layer, by the ending of their keys; both directions.

What the endings mean, beside shapes: a missing alpha is the rank. LyCORIS's rs_lora writes alpha * sqrt(rank), so that
alpha/rank is right without knowing of it; but for GLoRA, and for a LoKr of two whole halves, the file alone does not
tell (the training metadata `ss_network_args` does). DyLoRA's files are LoRA's. `dora_scale` is per output when its
first side has all numbers, (out, 1, 1, 1), per input when its second has, (1, in, 1, 1); diffusers also writes (out,)
and, of a convolution, (1, out, 1, 1), which counts as per output only where it cannot be per input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.delta import matrix_shape
from mmpeft.errors import FormatError, MethodError
from mmpeft.key_formats import lycoris_layers
from mmpeft.key_formats.lycoris_layers import GLORA, HALVES, LORA, REST, Parts, Shape
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.dora import DoraLayer, WeightDecomposedLayer
from mmpeft.methods.full import FullLayer
from mmpeft.methods.glora import GloraLayer
from mmpeft.methods.ia3 import Ia3Layer
from mmpeft.methods.locon import LoconLayer
from mmpeft.methods.loha import LohaLayer
from mmpeft.methods.lokr import LokrLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.methods.oft import InputOftLayer, OftLayer

_BIASES = ("diff_b", "b_norm")


def layer_from(
    name: str,
    parts: Mapping[str, Tensor],
    shape: Shape | None,
    *,
    rslora: bool = False,
    kohya_oft: bool = False,
) -> dict[str, LayerAdapter]:
    """Build the layer adapters of one layer from its tensors.

    Args:
        name: what errors call the layer.
        parts: the tensors by the ending of their keys ("lora_down.weight", "alpha", ...).
        shape: of the base's weight where it is known; a layer that does not fit it keeps the shape that its tensors
            tell.
        rslora: whether LyCORIS trained the file with rs_lora (in the metadata's `ss_network_args`).
        kohya_oft: whether kohya's own OFT trained the file (prefix "oft_unet"), in which alpha 0 holds it at no change.

    Returns:
        "": the weight's, "bias": the bias's; either may be absent.

    Raises:
        FormatError: tensors of two methods, one that is missing, empty or of no method, or shapes that do not fit.
    """
    # an extracted rest may have nothing to say
    if empty := [e for e, tensor in parts.items() if tensor.numel() == 0 and e not in REST.values()]:
        raise FormatError(f"{name} has no numbers in {empty[0]}")
    rest = dict(parts)
    biases = [rest.pop(ending) for ending in _BIASES if ending in rest]
    layers: dict[str, LayerAdapter] = {}
    if len(biases) > 1 or any(bias.ndim != 1 for bias in biases):
        raise FormatError(
            f"{name} needs one change of its bias, (n,); got {[tuple(b.shape) for b in biases]}"
        )
    if rest:
        form = _form_of(name, rest)
        layers[""] = form.build(Parts(name, rest, shape, rslora, kohya_oft))
    if biases:
        layers["bias"] = FullLayer(biases[0])
    return layers


def parts_of(weight: LayerAdapter | None, bias: LayerAdapter | None) -> dict[str, Tensor]:
    """Give one layer's tensors by the ending of their keys; `layer_from` reads them back.

    Alpha is written so that alpha/rank is the scale for every reader: rsLoRA's root is in it, a scale of two whole
    LoKr halves is in lokr_w1, and a kohya OFT that alpha 0 holds at no change has zeros for blocks.

    Raises:
        MethodError: the layer has no such form.
    """
    parts = {} if weight is None else _weight_parts(weight)
    if bias is not None:
        is_norm = isinstance(weight, FullLayer) and weight.diff.ndim == 1
        parts["b_norm" if is_norm else "diff_b"] = _bias_part(bias)
    return parts


@dataclass(frozen=True)
class _Form:
    """A method's endings: any of `needed` or `own` shows it, `shared` may stand beside."""

    title: str
    needed: frozenset[str]
    own: frozenset[str]
    shared: frozenset[str]
    build: Callable[[Parts], LayerAdapter]


def _declare(title: str, needed: str, own: str, shared: str, build: Callable[[Parts], LayerAdapter]) -> _Form:
    return _Form(title, frozenset(needed.split()), frozenset(own.split()), frozenset(shared.split()), build)


_FORMS = (
    _declare(
        "LoRA",
        "lora_down.weight lora_up.weight",
        "lora_mid.weight bias_indices bias_values bias_size",
        "alpha scale dora_scale",
        lycoris_layers.lora,
    ),
    _declare(
        "LoHa",
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
        "hada_t1 hada_t2",
        "alpha scale dora_scale",
        lycoris_layers.loha,
    ),
    _declare("LoKr", "", " ".join(HALVES), "alpha scale dora_scale", lycoris_layers.lokr),
    _declare("OFT", "oft_blocks", "", "alpha rescale", lycoris_layers.oft),
    _declare("old OFT", "oft_diag", "", "alpha", lycoris_layers.oft),
    _declare("(IA)³", "weight on_input", "", "", lycoris_layers.ia3),
    _declare("full", "diff", "", "", lycoris_layers.full),
    _declare("norm", "w_norm", "", "", lycoris_layers.norm),
    _declare("GLoRA", "a1.weight a2.weight b1.weight b2.weight", "bm.weight", "alpha", lycoris_layers.glora),
)


def _form_of(name: str, tensors: Mapping[str, Tensor]) -> _Form:
    if "lambda_layer" in tensors:
        raise FormatError(
            f"{name} is T-LoRA's, whose change is the difference to a start that is not in the file; save it as LoRA"
        )
    forms = [form for form in _FORMS if (form.needed | form.own) & tensors.keys()]
    if len(forms) > 1:
        raise FormatError(
            f"{name} has tensors of {forms[0].title} and of {forms[1].title}; one method is needed"
        )
    if not forms:
        raise FormatError(
            f"{name} has only {', '.join(sorted(tensors))}, which makes no layer of a known method"
        )
    form = forms[0]
    if missing := sorted(form.needed - tensors.keys()):
        raise FormatError(f"{name} has no {missing[0]}, which a layer of {form.title} needs")
    if strange := sorted(tensors.keys() - form.needed - form.own - form.shared):
        raise FormatError(f"{name} has {strange[0]!r}, which is no tensor of {form.title}")
    return form


def _weight_parts(layer: LayerAdapter) -> dict[str, Tensor]:
    match layer:
        case WeightDecomposedLayer():
            return {**_weight_parts(layer.direction), "dora_scale": layer.dora_scale}
        case DoraLayer():
            parts = _factors(layer, {**LORA, "lora_magnitude_vector": "dora_scale"})
            return {**parts, "dora_scale": parts["dora_scale"].reshape(-1, *[1] * (layer.lora_A.ndim - 1))}
        case LoraLayer() | LoconLayer():
            parts = _factors(layer, {**LORA, **REST})
            return {**parts, **_rest_size(layer)}
        case LohaLayer():
            return _factors(layer, {})
        case LokrLayer():
            return _lokr_parts(layer)
        case GloraLayer():
            return _factors(layer, GLORA)
        case OftLayer():
            parts = _factors(layer, {"oft_blocks": "oft_diag"} if layer.is_rotation else {})
            is_held = layer.freezes_at_zero and layer.alpha == 0
            return {**parts, "oft_blocks": torch.zeros_like(layer.oft_blocks)} if is_held else parts
        case Ia3Layer():
            return _ia3_parts(layer)
        case FullLayer():
            return {"diff" if layer.diff.ndim > 1 else "w_norm": layer.diff}
        case InputOftLayer():
            raise MethodError(
                "PEFT's OFT turns a layer's inputs, for which LyCORIS's files have no form; export it in PEFT's, or "
                "compose it with its base into a full difference"
            )
    raise MethodError(f"{layer.method} has no form in LyCORIS's files; compose it into a full difference")


_Factored = LoraLayer | LoconLayer | LohaLayer | LokrLayer | GloraLayer | OftLayer


def _factors(layer: _Factored, names: Mapping[str, str]) -> dict[str, Tensor]:
    tensors, alpha = layer.tensors, layer.alpha
    if isinstance(layer, LoraLayer | GloraLayer) and layer.rslora:
        alpha = layer.scale * layer.rank
    parts = {names.get(ours, ours): tensor for ours, tensor in tensors.items()}
    return {**parts, "alpha": _number(alpha, next(iter(tensors.values())))}


def _lokr_parts(layer: LokrLayer) -> dict[str, Tensor]:
    parts = _factors(layer, {})
    if layer.rank is None and layer.scale != 1:
        # readers take a scale of 1 where both halves are whole
        parts["lokr_w1"] = parts["lokr_w1"].float() * layer.scale
    return parts


def _ia3_parts(layer: Ia3Layer) -> dict[str, Tensor]:
    scaling = layer.scaling if layer.is_difference else layer.scaling.float() - 1
    count = scaling.numel()
    scaling = scaling.reshape(1, count, *scaling.shape[2:]) if scaling.ndim > 2 else scaling.reshape(count)
    return {"weight": scaling, "on_input": torch.tensor(int(layer.side == "input"))}


def _rest_size(layer: LoraLayer | LoconLayer) -> dict[str, Tensor]:
    if not isinstance(layer, LoconLayer) or layer.rest_indices is None:
        return {}
    return {"bias_size": torch.tensor(matrix_shape(layer.shape), dtype=layer.rest_indices.dtype)}


def _bias_part(bias: LayerAdapter) -> Tensor:
    if isinstance(bias, FullLayer):
        return bias.diff
    if isinstance(bias, Ia3Layer) and bias.base_weight is not None:
        return bias.dense()
    raise MethodError(
        f"a bias's change by {bias.method} has no form in LyCORIS's files; load the adapter with its base, which "
        f"makes it a difference, or export it in PEFT's form"
    )


def _number(value: float, like: Tensor) -> Tensor:
    """Write a number in a tensor's type, or as float32 where that would change it."""
    number = torch.tensor(value, dtype=like.dtype if like.is_floating_point() else torch.float32)
    return number if float(number) == value else torch.tensor(value, dtype=torch.float32)
