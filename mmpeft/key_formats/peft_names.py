"""What PEFT calls layers: by their live names, without the component, which has to be found out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_CLASSES = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
_UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.")


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


class Names:
    """The names of one component's layers in PEFT's files, and on disk.

    Args:
        there: shapes of what the base has, by name on disk with the component, where it is known. `shapes` has them by
            every name that a file may use.
    """

    def __init__(self, component: str, there: Mapping[str, tuple[int, ...]] | None) -> None:
        self._is_text = component.startswith("text_encoder")
        prefix = component + "."
        known = {name.removeprefix(prefix): s for name, s in (there or {}).items() if name.startswith(prefix)}
        live = {live_of(name): shape for name, shape in known.items()} if self._is_text else {}
        self.shapes = None if there is None else known | live

    def on_disk(self, name: str) -> str:
        """Give the name on disk of a layer named as in the file."""
        is_clip = self._is_text and name.startswith(("encoder.layers.", "final_layer_norm", "embeddings."))
        return f"text_model.{name}" if is_clip else name


def live_of(name: str) -> str:
    """Give the name of a layer in today's module tree: transformers 5 has no `text_model.` in CLIPTextModel."""
    return name.removeprefix("text_model.")
