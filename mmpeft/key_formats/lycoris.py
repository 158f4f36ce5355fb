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
from math import isfinite, isinf
from typing import Any

import torch
from torch import Tensor

from mmpeft.adapter import LayerAdapter, shapes_agree
from mmpeft.delta import Side, matrix_shape
from mmpeft.errors import FormatError, MethodError
from mmpeft.methods.dora import DoraLayer, WeightDecomposedLayer
from mmpeft.methods.full import FullLayer
from mmpeft.methods.glora import GloraLayer
from mmpeft.methods.ia3 import Ia3Layer
from mmpeft.methods.locon import LoconLayer
from mmpeft.methods.loha import LohaLayer
from mmpeft.methods.lokr import LokrLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.methods.oft import OftLayer

Shape = tuple[int, ...]

# our names of tensors -> endings of keys, where they differ
_LORA = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_mid": "lora_mid.weight"}
_REST = {"rest_indices": "bias_indices", "rest_values": "bias_values"}
_GLORA = {name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm")}
_HALVES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
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
        FormatError: tensors of two methods, one that is missing or belongs to none, or shapes that do not fit.
    """
    rest = dict(parts)
    biases = [rest.pop(ending) for ending in _BIASES if ending in rest]
    layers: dict[str, LayerAdapter] = {}
    if len(biases) > 1 or any(bias.ndim != 1 for bias in biases):
        raise FormatError(
            f"{name} needs one change of its bias, (n,); got {[tuple(b.shape) for b in biases]}"
        )
    if rest:
        form = _form_of(name, rest)
        layers[""] = form.build(_Parts(name, rest, shape, rslora, kohya_oft))
    if biases:
        layers["bias"] = FullLayer(biases[0])
    return layers


def parts_of(weight: LayerAdapter | None, bias: LayerAdapter | None) -> dict[str, Tensor]:
    """Give one layer's tensors by the ending of their keys; `layer_from` reads them back.

    Alpha is written so that alpha/rank is the scale. A butterfly or kohya's OFT needs no other endings; kohya's
    (`freezes_at_zero`) means the same to others only under kohya's prefix "oft_unet", or where alpha is not 0.

    Raises:
        MethodError: the layer has no such form.
    """
    parts = {} if weight is None else _weight_parts(weight)
    if bias is not None:
        is_norm = isinstance(weight, FullLayer) and weight.diff.ndim == 1
        parts["b_norm" if is_norm else "diff_b"] = _bias_part(bias)
    return parts


@dataclass(frozen=True)
class _Parts:
    """One layer's tensors, and what is known beside them."""

    name: str
    tensors: Mapping[str, Tensor]
    shape: Shape | None
    rslora: bool
    kohya_oft: bool

    def get(self, ending: str) -> Tensor | None:
        return self.tensors.get(ending)

    def named(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Give what there is of some tensors by our names."""
        return {ours: self.tensors[ending] for ours, ending in names.items() if ending in self.tensors}

    def number(self, ending: str, default: float) -> float:
        tensor = self.tensors.get(ending)
        if tensor is None:
            return default
        if tensor.numel() != 1:
            raise FormatError(f"{self.name} has {ending} {tuple(tensor.shape)}; one number is needed")
        return float(tensor)

    def alpha(self, rank: int) -> float:
        """Give alpha, which is the rank if nothing is said, and scale * rank where the file has a scale."""
        alpha = self.number("alpha", float(rank))
        alpha = self.number("scale", alpha / rank) * rank
        if not isfinite(alpha):
            raise FormatError(f"{self.name} has alpha {alpha}; a finite number is needed")
        return alpha

    def weight_shape(self, told: Shape) -> Shape | None:
        """Give the base's shape if it is the one that the tensors tell."""
        return self.shape if self.shape is not None and shapes_agree(told, self.shape) else None

    def expect(self, fits: bool, *endings: str) -> None:
        if not fits:
            shapes = ", ".join(f"{e} {tuple(self.tensors[e].shape)}" for e in endings if e in self.tensors)
            raise FormatError(f"{self.name} has {shapes}, which make no layer")


def _lora(parts: _Parts) -> LayerAdapter:
    A, B, mid = (
        parts.tensors["lora_down.weight"],
        parts.tensors["lora_up.weight"],
        parts.get("lora_mid.weight"),
    )
    endings = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
    parts.expect(A.ndim >= 2 and B.ndim >= 2 and all(side == 1 for side in B.shape[2:]), *endings)
    # LyCORIS's DyLoRA saves (out, rank) beside a convolution's lower factor
    B = B.reshape(*B.shape[:2], *[1] * (A.ndim - 2))
    if mid is None and A.shape[0] != B.shape[1]:
        raise FormatError(
            f"{parts.name} has rank {A.shape[0]} in lora_down.weight and {B.shape[1]} in lora_up.weight"
        )
    if mid is not None:
        fits = mid.ndim > 2 and tuple(mid.shape[:2]) == (B.shape[1], A.shape[0])
        parts.expect(fits and all(side == 1 for side in A.shape[2:]), *endings)
    alpha, rest = parts.alpha(A.shape[0]), _rest(parts, matrix_shape((B.shape[0], *A.shape[1:])))
    if mid is None and not rest:
        scale = parts.get("dora_scale")
        plain = LoraLayer(A, B, alpha)
        if scale is not None and _side(parts, plain.shape, scale) == "output":
            magnitude = scale.reshape(-1) if A.ndim == 2 else scale.reshape(1, -1, *[1] * (A.ndim - 2))
            return DoraLayer(A, B, alpha, lora_magnitude_vector=magnitude)
        return _decomposed(parts, plain)
    return _decomposed(parts, LoconLayer(A, B, alpha, mid, **rest))


def _rest(parts: _Parts, matrix: tuple[int, int]) -> dict[str, Tensor]:
    endings = ("bias_indices", "bias_values", "bias_size")
    rest = parts.named(_REST)
    if not rest and "bias_size" not in parts.tensors:
        return {}
    parts.expect(all(ending in parts.tensors for ending in endings), *endings)
    indices, values, size = (parts.tensors[ending] for ending in endings)
    parts.expect(tuple(indices.shape) == (2, values.numel()) and tuple(size.tolist()) == matrix, *endings)
    limits = torch.tensor(matrix)[:, None]
    parts.expect(bool(((indices.long() >= 0) & (indices.long() < limits)).all()), *endings)
    return rest


def _loha(parts: _Parts) -> LayerAdapter:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    found = parts.named({name: name for name in names})
    a, b, core = found["hada_w1_a"], found["hada_w1_b"], found.get("hada_t1")
    fits = (
        a.ndim == b.ndim == 2 and a.shape == found["hada_w2_a"].shape and b.shape == found["hada_w2_b"].shape
    )
    if core is None:
        fits = fits and "hada_t2" not in found and a.shape[1] == b.shape[0]
    else:
        fits = fits and "hada_t2" in found and core.shape == found["hada_t2"].shape and core.ndim > 2
        fits = fits and tuple(core.shape[:2]) == (a.shape[0], b.shape[0]) and a.shape[0] == b.shape[0]
    parts.expect(fits, *names)
    layer = LohaLayer(**found, alpha=parts.alpha(b.shape[0]))
    return _decomposed(
        parts, LohaLayer(**found, alpha=layer.alpha, weight_shape=parts.weight_shape(layer.shape))
    )


def _lokr(parts: _Parts) -> LayerAdapter:
    found = parts.named({name: name for name in _HALVES})
    parts.expect(lokr_fits(found), *_HALVES)
    lower = found.get("lokr_w2_b", found.get("lokr_w1_b"))
    if lower is None:
        alpha = parts.number("alpha", 1.0)
        if parts.rslora and isinf(alpha):
            raise FormatError(
                f"{parts.name} was trained with rs_lora and has alpha inf, so its scale cannot be told; save the file "
                f"as float32"
            )
    else:
        alpha = parts.alpha(lower.shape[0])
    rslora = parts.rslora and lower is None
    told = LokrLayer(alpha, **found).shape
    return _decomposed(parts, LokrLayer(alpha, **found, rslora=rslora, weight_shape=parts.weight_shape(told)))


def lokr_fits(found: Mapping[str, Tensor]) -> bool:
    """Tell whether LoKr's tensors make two halves, each whole or low-rank, and of one rank."""
    for half in ("lokr_w1", "lokr_w2"):
        pair = [found[f"{half}_{letter}"] for letter in "ab" if f"{half}_{letter}" in found]
        if (half in found) == bool(pair) or len(pair) == 1:
            return False
    ranks = set()
    if "lokr_w1_a" in found:
        a, b = found["lokr_w1_a"], found["lokr_w1_b"]
        if not a.ndim == b.ndim == 2:
            return False
        ranks |= {a.shape[1], b.shape[0]}
    elif found["lokr_w1"].ndim != 2:
        return False
    core = found.get("lokr_t2")
    if "lokr_w2_a" in found:
        a, b = found["lokr_w2_a"], found["lokr_w2_b"]
        if a.ndim != 2 or b.ndim < 2 or (core is not None and (core.ndim < 3 or b.ndim != 2)):
            return False
        ranks |= {a.shape[1], b.shape[0]} if core is None else {a.shape[0], b.shape[0], *core.shape[:2]}
    elif core is not None or found["lokr_w2"].ndim < 2:
        return False
    return len(ranks) <= 1


def _glora(parts: _Parts) -> LayerAdapter:
    found = parts.named(_GLORA)
    a1, a2, b1, b2, bm = (found.get(name) for name in _GLORA)
    assert a1 is not None and a2 is not None and b1 is not None and b2 is not None  # noqa: PT018
    rank, inputs = a2.shape[0], a2.shape[1]
    fits = (
        all(part.ndim >= 2 for part in found.values()) and rank == a1.shape[1] == b1.shape[1] == b2.shape[0]
    )
    fits = (
        fits and inputs == a1.shape[0] == b2.shape[1] and (bm is None or tuple(bm.shape[:2]) == (rank, rank))
    )
    fits = fits and all(side == 1 for part in (a1, a2, b1) for side in part.shape[2:])
    parts.expect(fits, *_GLORA.values())
    return GloraLayer(**found, alpha=parts.alpha(rank), rslora=parts.rslora)


def _oft(parts: _Parts) -> LayerAdapter:
    is_rotation = "oft_diag" in parts.tensors
    ending = "oft_diag" if is_rotation else "oft_blocks"
    blocks, rescale = parts.tensors[ending], parts.get("rescale")
    is_square = blocks.ndim in ((3,) if is_rotation else (3, 4)) and blocks.shape[-1] == blocks.shape[-2]
    parts.expect(is_square and (blocks.ndim == 3 or blocks.shape[-1] % 2 == 0), ending)
    layer = OftLayer(blocks, parts.number("alpha", 0.0), rescale, is_rotation, parts.kohya_oft)
    parts.expect(
        isfinite(layer.alpha) and (rescale is None or rescale.numel() == layer.out),
        ending,
        "rescale",
        "alpha",
    )
    settings = (layer.alpha, rescale, is_rotation, parts.kohya_oft, parts.weight_shape(layer.shape))
    return OftLayer(blocks, *settings)


def _ia3(parts: _Parts) -> LayerAdapter:
    scaling, side = parts.tensors["weight"], "input" if parts.number("on_input", 0.0) else "output"
    parts.expect(scaling.numel() == max(scaling.shape, default=1), "weight")
    told = Ia3Layer(scaling, side, True).shape  # type: ignore[arg-type]
    return Ia3Layer(scaling, side, True, parts.weight_shape(told))  # type: ignore[arg-type]


def _full(parts: _Parts) -> LayerAdapter:
    parts.expect(parts.tensors["diff"].ndim > 0, "diff")
    return FullLayer(parts.tensors["diff"])


def _norm(parts: _Parts) -> LayerAdapter:
    parts.expect(parts.tensors["w_norm"].ndim == 1, "w_norm")
    return FullLayer(parts.tensors["w_norm"])


def _decomposed(parts: _Parts, direction: LayerAdapter) -> LayerAdapter:
    scale = parts.get("dora_scale")
    if scale is None:
        return direction
    return WeightDecomposedLayer(direction, scale, _side(parts, direction.shape, scale))


def _side(parts: _Parts, shape: Shape, scale: Tensor) -> Side:
    """Tell whether magnitudes are per output or input; where only the matrix is known, inputs divide its columns."""
    count, place = scale.numel(), next((axis for axis, side in enumerate(scale.shape) if side != 1), 0)
    out, columns = shape[0], shape[1]
    is_input = columns == count or (len(shape) == 2 and parts.shape is None and columns % count == 0)
    if max(scale.shape, default=0) == count:
        if place == 0 and count == out:
            return "output"
        # one magnitude in all, of a layer with one input
        if (place == 1 or (count == 1 and scale.ndim > 1)) and is_input:
            return "input"
        if place == 1 and count == out:
            return "output"
    raise FormatError(
        f"{parts.name} has dora_scale {tuple(scale.shape)} for a weight {shape}; one number per output, ({out}, 1), or "
        f"per input, (1, {columns}), is needed"
    )


@dataclass(frozen=True)
class _Form:
    """A method's endings: any of `needed` or `own` shows it, `shared` may stand beside."""

    title: str
    needed: frozenset[str]
    own: frozenset[str]
    shared: frozenset[str]
    build: Callable[[_Parts], LayerAdapter]


def _declare(
    title: str, needed: str, own: str, shared: str, build: Callable[[_Parts], LayerAdapter]
) -> _Form:
    return _Form(title, frozenset(needed.split()), frozenset(own.split()), frozenset(shared.split()), build)


_FORMS = (
    _declare(
        "LoRA",
        "lora_down.weight lora_up.weight",
        "lora_mid.weight bias_indices bias_values bias_size",
        "alpha scale dora_scale",
        _lora,
    ),
    _declare(
        "LoHa", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_t1 hada_t2", "alpha scale dora_scale", _loha
    ),
    _declare("LoKr", "", " ".join(_HALVES), "alpha scale dora_scale", _lokr),
    _declare("OFT", "oft_blocks", "", "alpha rescale", _oft),
    _declare("old OFT", "oft_diag", "", "alpha rescale", _oft),
    _declare("(IA)³", "weight on_input", "", "", _ia3),
    _declare("full", "diff", "", "", _full),
    _declare("norm", "w_norm", "", "", _norm),
    _declare("GLoRA", "a1.weight a2.weight b1.weight b2.weight", "bm.weight", "alpha", _glora),
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
            parts = _factors(
                layer, {**_LORA, "lora_magnitude_vector": "dora_scale"}, layer.scale * layer.rank
            )
            return {**parts, "dora_scale": parts["dora_scale"].reshape(-1, *[1] * (layer.lora_A.ndim - 1))}
        case LoraLayer() | LoconLayer():
            parts = _factors(layer, {**_LORA, **_REST}, layer.scale * layer.rank)
            return {**parts, **_rest_size(layer)}
        case LohaLayer():
            return _factors(layer, {}, layer.alpha)
        case LokrLayer():
            return _lokr_parts(layer)
        case GloraLayer():
            return _factors(layer, _GLORA, layer.scale * layer.rank)
        case OftLayer():
            return _factors(layer, {"oft_blocks": "oft_diag"} if layer.is_rotation else {}, layer.alpha)
        case Ia3Layer():
            return _ia3_parts(layer)
        case FullLayer():
            return {"diff" if layer.diff.ndim > 1 else "w_norm": layer.diff}
    raise MethodError(
        f"{layer.method} as {type(layer).__name__.removesuffix('Layer')} has no form in LyCORIS's files; export it in "
        f"PEFT's, or compose it with its base into a full difference"
    )


def _factors(layer: LayerAdapter, names: Mapping[str, str], alpha: float) -> dict[str, Tensor]:
    tensors = layer.tensors
    like = next(iter(tensors.values()))
    return {
        **{names.get(ours, ours): tensor for ours, tensor in tensors.items()},
        "alpha": _number(alpha, like),
    }


def _lokr_parts(layer: LokrLayer) -> dict[str, Tensor]:
    parts = _factors(layer, {}, layer.alpha)
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
