"""Layer adapters from LyCORIS's and kohya's tensors of one layer, one function a method; see `lycoris`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, isinf
from typing import Any

import torch
from torch import Tensor

from mmpeft.delta import Side, matrix_shape
from mmpeft.errors import FormatError
from mmpeft.layer_adapter import LayerAdapter, shapes_agree
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
LORA = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_mid": "lora_mid.weight"}
REST = {"rest_indices": "bias_indices", "rest_values": "bias_values"}
GLORA = {name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm")}
HALVES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@dataclass(frozen=True)
class Parts:
    """One layer's tensors, and what is known beside them."""

    name: str
    tensors: Mapping[str, Tensor]
    shape: Shape | None
    rslora: bool
    kohya_oft: bool

    def get(self, ending: str) -> Tensor | None:
        """Give a tensor that may be missing."""
        return self.tensors.get(ending)

    def named(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Give what there is of some tensors by our names."""
        return {ours: self.tensors[ending] for ours, ending in names.items() if ending in self.tensors}

    def number(self, ending: str, default: float) -> float:
        """Give a number that may be missing; it may be infinite."""
        tensor = self.tensors.get(ending)
        if tensor is None:
            return default
        if tensor.numel() != 1:
            raise FormatError(f"{self.name} has {ending} {tuple(tensor.shape)}; one number is needed")
        if tensor.isnan().any():
            raise FormatError(f"{self.name} has {ending} nan; a number is needed")
        return float(tensor)

    def alpha(self, rank: int) -> float:
        """Give alpha, which is the rank if nothing is said, and scale * rank where the file has a scale."""
        scale = self.tensors.get("scale")
        alpha = self.number("alpha", float(rank)) if scale is None else self.number("scale", 1.0) * rank
        if not isfinite(alpha):
            raise FormatError(f"{self.name} has alpha {alpha}; a finite number is needed")
        return alpha

    def weight_shape(self, told: Shape) -> Shape | None:
        """Give the base's shape if it is the one that the tensors tell."""
        return self.shape if self.shape is not None and shapes_agree(told, self.shape) else None

    def expect(self, fits: bool, *endings: str) -> None:
        """Refuse tensors that do not fit each other.

        Raises:
            FormatError: with their shapes.
        """
        if not fits:
            shapes = ", ".join(f"{e} {tuple(self.tensors[e].shape)}" for e in endings if e in self.tensors)
            raise FormatError(f"{self.name} has {shapes}, which make no layer")


def lora(parts: Parts) -> LayerAdapter:
    """Build LoRA, DoRA or LoCon."""
    endings = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
    A, B, mid = parts.tensors[endings[0]], parts.tensors[endings[1]], parts.get(endings[2])
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
    layer = LoconLayer(A, B, parts.alpha(A.shape[0]), mid)
    if rest := _rest(parts, matrix_shape(layer.shape)):
        return _decomposed(parts, replace(layer, **rest))
    return _decomposed(parts, layer if mid is not None else LoraLayer(A, B, layer.alpha))


def _rest(parts: Parts, matrix: tuple[int, int]) -> dict[str, Any]:
    endings = ("bias_indices", "bias_values", "bias_size")
    rest = parts.named(REST)
    if not rest and "bias_size" not in parts.tensors:
        return {}
    parts.expect(all(ending in parts.tensors for ending in endings), *endings)
    indices, values, size = (parts.tensors[ending] for ending in endings)
    parts.expect(tuple(indices.shape) == (2, values.numel()) and tuple(size.tolist()) == matrix, *endings)
    limits = torch.tensor(matrix)[:, None]
    parts.expect(bool(((indices.long() >= 0) & (indices.long() < limits)).all()), *endings)
    return rest


def loha(parts: Parts) -> LayerAdapter:
    """Build LoHa."""
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
    return _decomposed(parts, replace(layer, weight_shape=parts.weight_shape(layer.shape)))


def lokr(parts: Parts) -> LayerAdapter:
    """Build LoKr."""
    found = parts.named({name: name for name in HALVES})
    first, second = (
        [found.get(f"{half}{end}") for end in ("", "_a", "_b")] for half in ("lokr_w1", "lokr_w2")
    )
    ranks = _ranks(first), _ranks(second, found.get("lokr_t2"))
    is_flat = all(part is None or part.ndim == 2 for part in first)
    parts.expect(is_flat and None not in ranks and len(set().union(*filter(None, ranks))) <= 1, *HALVES)
    lower = found.get("lokr_w2_b", found.get("lokr_w1_b"))
    if lower is not None:
        layer = LokrLayer(parts.alpha(lower.shape[0]), **found)
    else:
        layer = LokrLayer(parts.number("alpha", 1.0), **found, rslora=parts.rslora)
        if isinf(layer.scale):
            raise FormatError(
                f"{parts.name} was trained with rs_lora and has alpha inf, so its scale cannot be told; save the file "
                f"as float32"
            )
    return _decomposed(parts, replace(layer, weight_shape=parts.weight_shape(layer.shape)))


def _ranks(half: Sequence[Tensor | None], core: Tensor | None = None) -> set[int] | None:
    """Give the ranks of one half's tensors, none where it is whole; None where they make no half."""
    whole, a, b = half
    if whole is not None:
        return set() if whole.ndim >= 2 and a is b is core is None else None
    if a is None or b is None or a.ndim != 2 or b.ndim < 2:
        return None
    if core is None:
        return {a.shape[1], b.shape[0]}
    return {a.shape[0], b.shape[0], *core.shape[:2]} if core.ndim > 2 and b.ndim == 2 else None


def glora(parts: Parts) -> LayerAdapter:
    """Build GLoRA."""
    found = parts.named(GLORA)
    a1, a2, b1, b2 = (parts.tensors[GLORA[name]] for name in ("a1", "a2", "b1", "b2"))
    parts.expect(all(part.ndim >= 2 for part in found.values()), *GLORA.values())
    rank, inputs = a2.shape[:2]
    sides = a1.shape[:2] == (inputs, rank) and b1.shape[1] == rank and b2.shape[:2] == (rank, inputs)
    is_flat = all(side == 1 for part in (a1, a2, b1) for side in part.shape[2:])
    parts.expect(
        sides and is_flat and ("bm" not in found or found["bm"].shape[:2] == (rank, rank)), *GLORA.values()
    )
    return GloraLayer(**found, alpha=parts.alpha(rank), rslora=parts.rslora)


def oft(parts: Parts) -> LayerAdapter:
    """Build OFT of outputs: LyCORIS's, its butterflies, kohya's, or LyCORIS's old one."""
    is_rotation = "oft_diag" in parts.tensors
    ending = "oft_diag" if is_rotation else "oft_blocks"
    blocks, rescale, alpha = parts.tensors[ending], parts.get("rescale"), parts.number("alpha", 0.0)
    is_square = blocks.ndim in ((3,) if is_rotation else (3, 4)) and blocks.shape[-1] == blocks.shape[-2]
    parts.expect(is_square and (blocks.ndim == 3 or blocks.shape[-1] % 2 == 0), ending)
    freezes = parts.kohya_oft and "alpha" in parts.tensors
    layer = OftLayer(blocks, alpha, rescale, is_rotation, freezes)
    parts.expect(
        isfinite(alpha) and (rescale is None or rescale.numel() == layer.out), ending, "rescale", "alpha"
    )
    return replace(layer, weight_shape=parts.weight_shape(layer.shape))


def ia3(parts: Parts) -> LayerAdapter:
    """Build (IA)³."""
    scaling = parts.tensors["weight"]
    side: Side = "input" if parts.number("on_input", 0.0) else "output"
    parts.expect(scaling.numel() == max(scaling.shape, default=0), "weight")
    layer = Ia3Layer(scaling, side, is_difference=True)
    return replace(layer, weight_shape=parts.weight_shape(layer.shape))


def full(parts: Parts) -> LayerAdapter:
    """Build a full difference."""
    parts.expect(parts.tensors["diff"].ndim > 0, "diff")
    return FullLayer(parts.tensors["diff"])


def norm(parts: Parts) -> LayerAdapter:
    """Build the difference of a norm's gain."""
    parts.expect(parts.tensors["w_norm"].ndim == 1, "w_norm")
    return FullLayer(parts.tensors["w_norm"])


def _decomposed(parts: Parts, direction: LayerAdapter) -> LayerAdapter:
    scale = parts.get("dora_scale")
    if scale is None:
        return direction
    side = _side(parts, direction, scale)
    if not isinstance(direction, LoraLayer) or side == "input":
        return WeightDecomposedLayer(direction, scale, side)
    A, B = direction.lora_A, direction.lora_B
    # as PEFT has it
    magnitude = scale.reshape(-1) if A.ndim == 2 else scale.reshape(1, -1, *[1] * (A.ndim - 2))
    return DoraLayer(A, B, direction.alpha, lora_magnitude_vector=magnitude)


def _side(parts: Parts, direction: LayerAdapter, scale: Tensor) -> Side:
    """Tell whether magnitudes are per output or input; where only the matrix is known, inputs divide its columns."""
    (out, columns), count = direction.shape[:2], scale.numel()
    is_matrix = (
        isinstance(direction, LohaLayer | LokrLayer) and parts.shape is None and len(direction.shape) == 2
    )
    is_input = count == columns or (is_matrix and columns % count == 0)
    # which side has all the numbers; one number alone is on both
    first, second = scale.shape[:1] == (count,), scale.shape[1:2] == (count,)
    if first and count == out:
        return "output"
    if second and is_input:
        return "input"
    if second and count == out:
        return "output"
    raise FormatError(
        f"{parts.name} has dora_scale {tuple(scale.shape)} for a weight {direction.shape}; one number per output, "
        f"({out}, 1), or per input, (1, {columns}), is needed"
    )
