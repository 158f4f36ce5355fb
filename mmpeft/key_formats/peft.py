"""PEFT's files: one component each, "base_model.model.<layer>.lora_A.weight", settings in adapter_config.json.

Ranks and alphas per layer are regular expressions there, matched against the end of a layer's name. LoHa, LoKr, OFT and
(IA)³ are in `peft_methods`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from mmpeft.errors import FormatError, MethodError
from mmpeft.key_formats import peft_methods, peft_settings
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.dora import DoraLayer
from mmpeft.methods.full import FullLayer
from mmpeft.methods.ia3 import Ia3Layer
from mmpeft.methods.loha import LohaLayer
from mmpeft.methods.lokr import LokrLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.methods.oft import InputOftLayer

PREFIX = "base_model.model."
# The keys of a layer in PEFT's own naming, with ours.
ENDINGS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_B.bias": "lora_B_bias",
}
# What a configuration may say that changes the effect in ways that the tensors of layers do not hold.
_REFUSED = {
    "modules_to_save": (None, "it replaces whole modules"),
    "layer_replication": (None, "it replicates layers"),
    "target_parameters": (None, "it adapts bare parameters"),
    "trainable_token_indices": (None, "it trains embedding rows"),
    "fan_in_fan_out": (False, "its base stores weights transposed"),
    "alora_invocation_tokens": (None, "it counts only after some words of the prompt"),
    "use_qalora": (False, "it sees pooled inputs"),
    "use_bdlora": (None, "its factors are split over devices"),
    "arrow_config": (None, "it chooses among adapters token by token"),
    "kasa_config": (None, "it changes the base's weights"),
}
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OTHER_METHODS = (LohaLayer, LokrLayer, InputOftLayer, Ia3Layer)


def is_ours(keys: Iterable[str]) -> bool:
    """Tell whether keys look like PEFT's."""
    return any(key.startswith(PREFIX) for key in keys)


def read(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    bias_of: Callable[[str], Tensor | None] | None = None,
) -> dict[str, LayerAdapter]:
    """Turn a PEFT file into layer adapters, by the layer names in the file.

    Args:
        tensors: the weights file.
        config: adapter_config.json.
        shapes: of the base's layers and biases, by names as in the file, where it is known.
        bias_of: gives the base's bias of a layer named as in the file, None where it has none; PEFT saves trained
            biases whole, and what changed is the difference.

    Raises:
        FormatError: another method, a setting that the tensors do not hold, or keys that are none of the method's.
    """
    refuse_unheld(config)
    kind = str(config.get("peft_type"))
    if kind == "LORA":
        return _read_lora(tensors, config, bias_of)
    endings = {f".{ending}": ending for ending in peft_methods.ENDINGS.get(kind, ())}
    if not endings:
        raise FormatError(f"PEFT's {kind} cannot be read; LORA, {', '.join(peft_methods.ENDINGS)} can")
    layers: dict[str, LayerAdapter] = {}
    for name, parts in _named(tensors, endings, kind).items():
        shape, bias_shape = (shapes.get(name), shapes.get(f"{name}.bias")) if shapes else (None, None)
        found = peft_methods.peft_layer_from(kind, config, name, parts, shape, bias_shape)
        layers |= {f"{name}.{ending}" if ending else name: layer for ending, layer in found.items()}
    return layers


def refuse_unheld(config: Mapping[str, Any]) -> None:
    """Refuse settings whose effect the tensors of layers do not hold.

    Raises:
        FormatError: naming the first of them, or a value of the wrong kind.
    """
    peft_settings.check_settings(config)
    for name, (harmless, meaning) in _REFUSED.items():
        if config.get(name, harmless) not in (harmless, None, [], {}):
            raise FormatError(f"this adapter cannot be read: {meaning} ({name} = {config[name]!r})")


def layer_names(keys: Iterable[str]) -> list[str]:
    """Give the layer names in a PEFT file, whatever its method."""
    endings = [*ENDINGS, ".bias", *(f".{e}" for known in peft_methods.ENDINGS.values() for e in known)]
    names = (next((key.removesuffix(e) for e in endings if key.endswith(e)), key) for key in keys)
    return list(dict.fromkeys(name.removeprefix(PREFIX) for name in names))


def _read_lora(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], bias_of: Callable[[str], Tensor | None] | None
) -> dict[str, LayerAdapter]:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise FormatError(
            f"this PEFT adapter starts from {start}, which changes the base's weights; save it as plain LoRA first "
            f"(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    trains_biases = config.get("bias", "none") != "none"
    whole = {key for key in tensors if trains_biases and key.endswith(".bias") and ".lora_" not in key}
    if whole and bias_of is None:
        raise FormatError(
            f"its trained biases are saved whole (bias = {config['bias']!r}); give the base, from which they differ"
        )
    layers: dict[str, LayerAdapter] = {}
    for key in sorted(whole):
        name = key.removeprefix(PREFIX).removesuffix(".bias").removesuffix(".base_layer")
        before = bias_of(name) if bias_of else None
        if before is None or before.shape != tensors[key].shape:
            raise FormatError(
                f"{name} has a bias {tuple(tensors[key].shape)} in the file, and none like it in the base"
            )
        layers[f"{name}.bias"] = FullLayer(tensors[key].float() - before.float().cpu())
    factors = {key: tensor for key, tensor in tensors.items() if key not in whole}
    for name, parts in _named(factors, ENDINGS, "LoRA or DoRA").items():
        for ending, layer in layers_from(name, parts, *settings_of(config, name)).items():
            full = f"{name}.{ending}" if ending else name
            if full in layers:
                raise FormatError(f"{full} changes twice: a trained bias, and one in lora_B")
            layers[full] = layer
    return layers


def _named(
    tensors: Mapping[str, Tensor], endings: Mapping[str, str], method: str
) -> dict[str, dict[str, Tensor]]:
    """Sort tensors by layer and by our names of them."""
    named: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in endings if key.endswith(ending)), None)
        if ending is None:
            raise FormatError(f"{key!r} is no key of a {method} layer")
        layer = key.removeprefix(PREFIX).removesuffix(ending)
        named.setdefault(layer, {})[endings[ending]] = tensor
    return named


def write(component: str, layers: Mapping[str, LayerAdapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Turn one component's layer adapters into PEFT's tensors and configuration.

    Keys are live names, as PEFT knows no others; of the component text_encoder those of transformers 5.

    Raises:
        MethodError: layers that PEFT cannot hold in one adapter.
    """
    general = {"task_type": None, "inference_mode": True}
    live = {live_of(name) if component == "text_encoder" else name: layer for name, layer in layers.items()}
    if any(type(layer) in _OTHER_METHODS for layer in live.values()):
        biases = {name.removesuffix(".bias"): layer for name, layer in live.items() if name.endswith(".bias")}
        weights = {
            name: live.get(name) for name in dict.fromkeys(name.removesuffix(".bias") for name in live)
        }
        tensors = {
            f"{PREFIX}{name}.{part}": tensor
            for name, layer in weights.items()
            for part, tensor in peft_methods.peft_parts_of(layer, biases.get(name)).items()
        }
        return tensors, {**general, **peft_settings.peft_config_of(live)}
    config = lora_config(layers)
    tensors = {
        f"{PREFIX}{name}.{part}{'' if part == 'lora_magnitude_vector' else '.weight'}": tensor
        for name, layer in live.items()
        for part, tensor in layer.tensors.items()
    }
    return tensors, {"peft_type": "LORA", **general, "bias": "none", **config}


def lora_config(layers: Mapping[str, LayerAdapter]) -> dict[str, Any]:
    """State one component's ranks and alphas as the fewest LoraConfig fields, which old PEFT versions know too.

    Patterns are whole names: anchored for a UNet or transformer, whose live names are those on disk; matched at the end
    for CLIP, whose live names have `text_model.` in front or not by transformers' version.

    Raises:
        MethodError: another method than LoRA or DoRA, or both of them in one component.
    """
    lora = {name: layer for name, layer in layers.items() if isinstance(layer, LoraLayer)}
    if strange := sorted({layer.method for layer in layers.values()} - {"lora", "dora"}):
        raise MethodError(f"diffusers and PEFT load LoRA and DoRA; this adapter has {', '.join(strange)}")
    if len({layer.method for layer in lora.values()}) > 1:
        raise MethodError("LoRA and DoRA layers in one component cannot be loaded by diffusers or PEFT")
    # One flag serves a whole component: where they differ, rsLoRA's factor goes into alpha.
    rslora = all(layer.rslora for layer in lora.values())
    alphas = {
        n: layer.alpha if layer.rslora == rslora else layer.scale * layer.rank for n, layer in lora.items()
    }
    ranks = {name: layer.rank for name, layer in lora.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "target_modules": sorted(map(live_of, lora)),
        "rank_pattern": {_pattern(name): value for name, value in sorted(ranks.items()) if value != rank},
        "alpha_pattern": {
            _pattern(name): _number(value) for name, value in sorted(alphas.items()) if value != alpha
        },
        "use_dora": any(layer.method == "dora" for layer in lora.values()),
        "use_rslora": rslora,
        "lora_bias": False,
    }


def settings_of(config: Mapping[str, Any], layer: str) -> tuple[int, float, bool]:
    """Give (rank, alpha, rslora) of a layer from LoraConfig fields, as PEFT resolves them."""
    rank = _resolve(config.get("rank_pattern") or {}, layer, config.get("r", 8))
    alpha = _resolve(config.get("alpha_pattern") or {}, layer, config.get("lora_alpha", 8))
    return int(rank), float(alpha), bool(config.get("use_rslora", False))


def layers_from(
    name: str, parts: Mapping[str, Tensor], rank: int | None, alpha: float | None, rslora: bool
) -> dict[str, LayerAdapter]:
    """Build the layer adapters of one layer from its tensors: "" the weight's, "bias" that of a bias in lora_B.

    Args and errors are those of `layer_from`.
    """
    layer = layer_from(name, parts, rank, alpha, rslora)
    bias = parts.get("lora_B_bias")
    if bias is None:
        return {"": layer}
    if tuple(bias.shape) != (layer.lora_B.shape[0],) or isinstance(layer, DoraLayer):
        raise FormatError(
            f"{name} has a bias {tuple(bias.shape)} in lora_B, which fits no {layer.method} layer"
        )
    return {"": layer, "bias": FullLayer(bias.float() * layer.scale)}


def layer_from(
    name: str, parts: Mapping[str, Tensor], rank: int | None, alpha: float | None, rslora: bool
) -> LoraLayer:
    """Build a LoRA or DoRA layer adapter from its tensors.

    Args:
        rank: what the file's settings say, to be checked; None if they say nothing.
        alpha: None if the file says nothing, which means alpha = rank.

    Raises:
        FormatError: a factor is missing, ranks differ, or shapes are none of a linear layer's or convolution's.
    """
    A, B, magnitude = (parts.get(part) for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
    if A is None or B is None:
        raise FormatError(f"{name} has no lora_{'A' if A is None else 'B'}")
    if not A.numel() or not B.numel():
        raise FormatError(f"{name} has no numbers in lora_{'B' if A.numel() else 'A'}")
    is_linear = A.ndim == B.ndim == 2
    is_conv = A.ndim == B.ndim == 4 and B.shape[2:] == (1, 1)
    if not (is_linear or is_conv):
        raise FormatError(
            f"{name} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, which make no layer"
        )
    if A.shape[0] != B.shape[1]:
        raise FormatError(f"{name} has rank {A.shape[0]} in lora_A and {B.shape[1]} in lora_B")
    if rank is not None and rank != A.shape[0]:
        raise FormatError(f"{name} has rank {A.shape[0]}, but the file's settings say {rank}")
    alpha = float(A.shape[0]) if alpha is None else alpha
    if magnitude is None:
        return LoraLayer(A, B, alpha, rslora)
    expected = (B.shape[0],) if is_linear else (1, B.shape[0], 1, 1)
    if tuple(magnitude.shape) != expected:
        raise FormatError(
            f"{name} has magnitudes {tuple(magnitude.shape)}; {expected} are needed, one per output"
        )
    return DoraLayer(A, B, alpha, rslora, lora_magnitude_vector=magnitude)


def live_of(name: str) -> str:
    """Give the name of a layer in today's module tree: transformers 5 has no `text_model.` in CLIPTextModel."""
    return name.removeprefix("text_model.")


def _pattern(name: str) -> str:
    live = live_of(name)
    return live if live != name else f"^{name}"


def _resolve(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (layer, live_of(layer))):
            return value
    return default


def _commonest(values: Iterable[Any]) -> Any:
    # ties go to the smallest, so that equal adapters give equal files
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]))[0]


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
