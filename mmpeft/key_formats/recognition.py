"""Whose names the keys of an adapter's file are, and its layers read by the format that knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mmpeft.errors import FormatError
from mmpeft.key_formats import diffusers, kohya, peft, peft_component
from mmpeft.layer_adapter import LayerAdapter, shapes_agree

# Whose keys look like what, to say so where a file holds several tools'.
_FORMATS = {"PEFT's": peft.is_ours, "kohya's": kohya.is_ours, "diffusers'": diffusers.is_ours}
# What the first keys of files that are no adapter look like.
_LIKENESSES = {
    (
        "model.diffusion_model.",
        "first_stage_model.",
        "cond_stage_model.",
    ): "a whole model's, not an adapter's",
    (
        "lora_A",
        "lora_B",
        "lora_down",
        "lora_up",
    ): "LoRA's, but without a component (unet., text_encoder.) in front",
}


def is_known(keys: Iterable[str]) -> bool:
    """Tell whether keys are in a format that can be read."""
    keys = list(keys)
    return any(is_ours(keys) for is_ours in _FORMATS.values())


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    peft_config: Callable[[], Mapping[str, Any]],
    component: str | None = None,
    there: Mapping[str, tuple[int, ...]] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    *,
    keep_unknown: bool = False,
) -> dict[str, LayerAdapter]:
    """Turn a file's tensors into layer adapters by layer name, whoever's names they have; numbers are not looked at.

    Args:
        tensors: the file's.
        metadata: the file's header.
        peft_config: reads the configuration beside a PEFT file.
        component: the component of a PEFT file whose place tells it.
        there: shapes of what the base has, by name on disk with the component, where it is known.
        modules: of the base by component, where they are at hand.
        keep_unknown: whether names that need a base stay as they are in the file, for looking at it alone.

    Raises:
        FormatError: a key is unknown, or keys of several tools are mixed.
        BaseMismatch: names that the base does not have.
    """
    found = {
        name: next(key for key in tensors if is_ours([key]))
        for name, is_ours in _FORMATS.items()
        if is_ours(tensors)
    }
    if len(found) > 1:
        examples = " and ".join(f"{name} {key!r}" for name, key in found.items())
        raise FormatError(f"keys of {len(found)} tools are mixed, {examples}; split the file by tool")
    if "PEFT's" in found:
        config = peft_config()
        layers = peft_component.read(tensors, config, component, there, modules, keep_unknown=keep_unknown)
        return layers if component or config.get("auto_mapping") else _in_encoder_that_fits(layers, there)
    if "kohya's" in found:
        return kohya.read(tensors, metadata, there, keep_unknown=keep_unknown)
    if "diffusers'" in found:
        layers = diffusers.read(tensors, metadata, there)
        is_told = any(key.startswith("text_encoder") for key in tensors)
        return layers if is_told else _in_encoder_that_fits(layers, there)
    raise FormatError(f"nothing in it is known: its keys look like {_likeness(tensors)}")


def _in_encoder_that_fits(
    layers: dict[str, LayerAdapter], there: Mapping[str, tuple[int, ...]] | None
) -> dict[str, LayerAdapter]:
    """Give layers of a text encoder that nothing but their names told to the encoder of the base that they fit."""
    if there is None or any(not name.startswith("text_encoder.") for name in layers):
        return layers
    for encoder in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        moved = {encoder + name.removeprefix("text_encoder"): layer for name, layer in layers.items()}
        if all(name in there and shapes_agree(tuple(x.shape), there[name]) for name, x in moved.items()):
            return moved
    return layers


def _likeness(keys: Iterable[str]) -> str:
    keys = list(keys)
    for signs, words in _LIKENESSES.items():
        if any(sign in key for key in keys[:100] for sign in signs):
            return f"{words} (first {keys[0]!r})"
    return f"no adapter's (first {keys[0]!r})"
