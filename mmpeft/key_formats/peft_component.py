"""A PEFT file in its place in a base: which component it belongs to, and what its layers are called on disk.

PEFT knows the one module that it was put on, by live names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mmpeft.errors import FormatError
from mmpeft.injection import vectors_of
from mmpeft.key_formats import peft
from mmpeft.layer_adapter import LayerAdapter

_CLASSES = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
_UNET_BLOCKS = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_in",
    "conv_out",
    "time_embedding.",
    "add_embedding.",
)


def read(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    component: str | None = None,
    there: Mapping[str, tuple[int, ...]] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    *,
    keep_unknown: bool = False,
) -> dict[str, LayerAdapter]:
    """Turn a PEFT file into layer adapters by layer name on disk with the component.

    Args:
        tensors: the weights file.
        config: adapter_config.json.
        component: that it belongs to, where its place says so; otherwise configuration, names and base are asked.
        there, modules, keep_unknown: as `recognition.read` takes them.

    Raises:
        FormatError: nothing tells the component, or what `peft.read` refuses.
    """
    peft.refuse_unheld(config)
    component = component or _component_in(there, component_of(peft.layer_names(tensors), config))
    if component is None and not keep_unknown:
        raise FormatError(
            "it does not say which component it belongs to; give the base that it was trained on"
        )
    component = component or "model"
    names = _Names(component, there)
    model = modules.get(component) if modules is not None else None
    vectors = vectors_of(component, model) if model is not None else {}

    def bias_of(name: str) -> Tensor | None:
        return vectors.get(f"{names.on_disk(name)}.bias")

    layers = peft.read(tensors, config, names.shapes, None if model is None else bias_of)
    return {f"{component}.{names.on_disk(name)}": layer for name, layer in layers.items()}


def component_of(layers: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """Guess which component a PEFT file belongs to from its base's class, else from its layer names."""
    model_class = str((config.get("auto_mapping") or {}).get("base_model_class", ""))
    if model_class in _CLASSES:
        return _CLASSES[model_class]
    if config.get("task_type") == "CAUSAL_LM" or model_class.endswith("ForCausalLM"):
        return "language_model"
    if "Transformer" in model_class:
        return "transformer"
    names = list(layers)
    if names and all(name.startswith(_UNET_BLOCKS) for name in names):
        return "unet"
    if names and all(
        re.match(r"(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp)\.", name) for name in names
    ):
        return "text_encoder"
    return None


def _component_in(there: Mapping[str, tuple[int, ...]] | None, guess: str | None) -> str | None:
    """Give the base's component where it has only one, else the guess."""
    known = {name.partition(".")[0] for name in there or ()}
    return known.pop() if len(known) == 1 else guess


class _Names:
    """The names of one component's layers in PEFT's files, and on disk.

    Args:
        there: shapes of what the base has, by name on disk with the component, where it is known. `shapes` has them by
            every name that a file may use.
    """

    def __init__(self, component: str, there: Mapping[str, tuple[int, ...]] | None) -> None:
        self._is_text = component.startswith("text_encoder")
        prefix = component + "."
        known = {name.removeprefix(prefix): s for name, s in (there or {}).items() if name.startswith(prefix)}
        live = {peft.live_of(name): shape for name, shape in known.items()} if self._is_text else {}
        self.shapes = None if there is None else known | live

    def on_disk(self, name: str) -> str:
        is_clip = self._is_text and name.startswith(("encoder.layers.", "final_layer_norm", "embeddings."))
        return f"text_model.{name}" if is_clip else name
