"""diffusers' files: all components in one, "unet.<layer>.lora_A.weight", settings in the header.

The header key `lora_adapter_metadata` is a JSON object of LoraConfig fields with the component in front ("unet.r").
Without it diffusers takes alpha = rank. Older names that are read: `lora.down`/`lora.up` and `lora_linear_layer.*`
(down is A), and attention processors' `processor.to_q_lora.*`, which in text encoders stand for `q_proj`. What a model
saves by itself (`save_lora_adapter`, `save_attn_procs`) has no component in front, in names and settings alike. PEFT's
other methods are saved so as well, though diffusers does not load them again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mmpeft.errors import FormatError
from mmpeft.injection import COMPONENTS
from mmpeft.key_formats import kohya_names, peft, peft_methods
from mmpeft.layer_adapter import LayerAdapter

SETTINGS_KEY = "lora_adapter_metadata"
_COMPONENT = re.compile(rf"({'|'.join(sorted(COMPONENTS, reverse=True))})\.")
_LEGACY_ENDINGS = {
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".lora_linear_layer.down.weight": "lora_A",
    ".lora_linear_layer.up.weight": "lora_B",
    ".lora.up.bias": "lora_B_bias",
    ".lora_linear_layer.up.bias": "lora_B_bias",
    ".lora.alpha": "alpha",
    ".lora_linear_layer.alpha": "alpha",
    ".alpha": "alpha",
}
_OTHER_ENDINGS = {f".{ending}": ending for known in peft_methods.ENDINGS.values() for ending in known}
_PROCESSOR = re.compile(r"\.(?:to_(q|k|v|out)|add_(k|v)_proj)_lora\.(?:(down|up)\.weight|(alpha))$")


def is_ours(keys: Iterable[str]) -> bool:
    """Tell whether keys look like diffusers': with a component in front, or names that only one component has."""
    return any(_split(key) is not None for key in keys)


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, LayerAdapter]:
    """Turn a diffusers file into layer adapters by layer name with the component in front.

    Args:
        tensors: the file's tensors.
        metadata: the file's header metadata.
        shapes: of the base's layers and biases, by name on disk with the component in front, where it is known.

    Raises:
        FormatError: a key that is none of a known method's, broken settings, or factors that do not fit.
    """
    named: dict[tuple[str, str], dict[str, Tensor]] = {}
    alone = _component_of_bare(tensors)
    for key, tensor in tensors.items():
        split = _split(key, alone)
        if split is None:
            raise FormatError(f"{key!r} is no key of an adapter's layer in diffusers' files")
        component, layer, part = split
        parts = named.setdefault((component, layer), {})
        if part in parts:
            raise FormatError(f"{component}.{layer} has its {part} twice, under two names")
        parts[part] = tensor
    settings = _settings(metadata)
    layers: dict[str, LayerAdapter] = {}
    for (component, layer), parts in named.items():
        own = settings.get("" if alone else component, {})
        for ending, built in _layers_from(component, layer, parts, own, shapes or {}).items():
            layers[f"{component}.{layer}.{ending}" if ending else f"{component}.{layer}"] = built
    return layers


def _layers_from(
    component: str,
    layer: str,
    parts: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, LayerAdapter]:
    """Build one layer's adapters, "" the weight's and "bias" the bias's, by its component's settings."""
    name, kind = f"{component}.{layer}", settings.get("peft_type", "LORA")
    if kind in peft_methods.ENDINGS:
        # their patterns are about live names
        live = peft.live_of(layer) if component.startswith("text_encoder") else layer
        shape, bias_shape = shapes.get(name), shapes.get(f"{name}.bias")
        return peft_methods.peft_layer_from(kind, settings, live, parts, shape, bias_shape)
    if others := sorted(parts.keys() & set(_OTHER_ENDINGS.values())):
        raise FormatError(
            f"{name} has {others[0]}, and the header does not have the settings that tell its strength"
        )
    rank, alpha, rslora = peft.settings_of(settings, layer) if settings else (None, None, False)
    if "alpha" in parts:
        if settings:
            raise FormatError(f"{name} states its alpha twice, as a tensor and in the header")
        if parts["alpha"].numel() != 1:
            raise FormatError(f"{name} has alpha {tuple(parts['alpha'].shape)}; one number is needed")
        alpha = float(parts["alpha"])
    return peft.layers_from(name, parts, rank, alpha, rslora)


def write(components: Mapping[str, Mapping[str, LayerAdapter]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Turn layer adapters, by component and layer name, into a file's tensors and header metadata.

    Raises:
        MethodError: layers that diffusers cannot load.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, layers in sorted(components.items()):
        settings.update({f"{component}.{key}": value for key, value in peft.lora_config(layers).items()})
        for layer, adapter in layers.items():
            for part, tensor in adapter.tensors.items():
                # transformers loads a magnitude only with ".weight", every diffusers version only without
                bare = part == "lora_magnitude_vector" and not component.startswith("text_encoder")
                tensors[f"{component}.{layer}.{part}{'' if bare else '.weight'}"] = tensor
    return tensors, {"format": "pt", SETTINGS_KEY: json.dumps(settings, sort_keys=True)}


def _component_of_bare(keys: Iterable[str]) -> str | None:
    """Tell which component a file is of that has none in front of its names; None where its names have one."""
    if any(_COMPONENT.match(key) for key in keys):
        return None
    found = {component for key in keys if (component := _guess(key))}
    return found.pop() if len(found) == 1 else None


def _guess(key: str) -> str | None:
    return kohya_names.component_of(kohya_names.flattened(key))


def _split(key: str, alone: str | None = None) -> tuple[str, str, str] | None:
    """Take a key apart into (component, layer name on disk, our name of the tensor).

    Args:
        alone: the component of a file that has none in its names.
    """
    match = _COMPONENT.match(key)
    component, rest = (match[1], key[match.end() :]) if match else (alone or _guess(key), key)
    if component is None:
        return None
    rest = rest.replace(".processor.", ".")
    is_text = component.startswith("text_encoder")
    if processor := _PROCESSOR.search(rest):
        letter, added, side, alpha = processor.groups()
        leaf = f"{letter}_proj" if is_text else "to_out.0" if letter == "out" else f"to_{letter}"
        leaf = f"add_{added}_proj" if added else leaf
        layer = f"{rest[: processor.start()]}.{leaf}"
        part = alpha or ("lora_A" if side == "down" else "lora_B")
    else:
        endings = {**peft.ENDINGS, **_LEGACY_ENDINGS, **_OTHER_ENDINGS}
        ending = next((ending for ending in endings if rest.endswith(ending)), None)
        if ending is None:
            return None
        layer, part = rest.removesuffix(ending), endings[ending]
    if is_text and re.match(r"encoder\.layers\.\d+\.", layer):
        layer = f"text_model.{layer}"
    return component, layer, part


def _settings(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    if SETTINGS_KEY not in metadata:
        return {}
    try:
        flat = json.loads(metadata[SETTINGS_KEY])
        nested: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, dot, name = key.partition(".")
            nested.setdefault(component if dot else "", {})[name if dot else key] = value
    except (ValueError, RecursionError, AttributeError) as error:
        raise FormatError(f"the header's {SETTINGS_KEY} is no JSON object") from error
    for config in nested.values():
        peft.refuse_unheld(config)
    return nested
