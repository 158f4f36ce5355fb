"""The modules of a live base that can carry adapters: found, checked against an adapter's layers, and their weights.

Layers are named as on disk with the component in front; modules are given by component.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmpeft.backbones.pocket import pocket_folder
from mmpeft.errors import AdapterError, BaseError, BaseMismatch
from mmpeft.injection import COMPONENTS, live_parameters, shapes
from mmpeft.layer_adapter import LayerAdapter, by_component, shapes_agree


def modules_of(base: Any) -> dict[str, nn.Module]:
    """Give the modules that can carry adapters, by component name: of a pipeline, a module, a folder or a mapping.

    Args:
        base: "pocket" is the embedded base's folder; a folder is diffusers' of a pipeline, or transformers' of a model.

    Raises:
        AdapterError: there are none.
        BaseError: the folder cannot be opened.
    """
    if isinstance(base, str | Path):
        base = _opened(pocket_folder() if base == "pocket" else Path(base))
    if isinstance(base, nn.Module):
        kind = type(getattr(base, "_orig_mod", base)).__name__
        names = {"UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder"}
        return {names.get(kind, "transformer" if "Transformer" in kind else "language_model"): base}
    parts = base if isinstance(base, Mapping) else getattr(base, "components", {})
    found = {name: parts[name] for name in COMPONENTS if isinstance(parts.get(name), nn.Module)}
    if not found:
        raise AdapterError(f"{type(base).__name__} has no component that can carry adapters")
    return found


def _opened(base: Path) -> Any:
    """Open a pipeline's folder (or hub name in the cache), or the folder of one transformers model."""
    from diffusers import DiffusionPipeline

    from mmpeft.backbones.stable_diffusion_files import quietly

    opener: Any = DiffusionPipeline
    try:
        if (base / "config.json").is_file() and not (base / "model_index.json").exists():
            import transformers

            # it names the class that it was saved from
            (name, *_) = json.loads((base / "config.json").read_text(encoding="utf-8"))["architectures"]
            opener = getattr(transformers, name)
        with quietly():
            return opener.from_pretrained(str(base), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseError(
            f"cannot open the base {base}: it is no folder of a diffusers pipeline or a transformers model"
        ) from error


def check_fits(
    layers: Mapping[str, LayerAdapter], modules: Mapping[str, nn.Module], title: str, trained_on: str = ""
) -> None:
    """Check that every layer of an adapter exists in a base, in the same shape.

    Args:
        title: what the error calls the adapter.
        trained_on: the name of the base that it was trained on, for the error; "" where it is unknown.

    Raises:
        BaseMismatch: it does not, with how many layers match.
    """
    matched, wrong = dict.fromkeys(by_component(layers), 0), []
    there = shapes({name: module for name, module in modules.items() if name in matched})
    for name, layer in layers.items():
        shape = there.get(name)
        if shape is None:
            wrong.append(f"there is no {name}")
        elif not shapes_agree(tuple(layer.shape), shape):
            wrong.append(f"{name} has weight {shape}, the adapter's is {tuple(layer.shape)}")
        else:
            matched[name.split(".", 1)[0]] += 1
    if wrong:
        whose = f"{title} was trained on {trained_on} and" if trained_on else title
        base = ", ".join(f"{name} ({type(module).__name__})" for name, module in sorted(modules.items()))
        raise BaseMismatch(
            f"{whose} does not fit this base, {base}: {sum(matched.values())} of {len(layers)} layers match; {wrong[0]}"
            f"{_by_component(layers, matched)}"
        )


def _by_component(layers: Mapping[str, LayerAdapter], matched: Mapping[str, int]) -> str:
    if len(matched) == 1:
        return ""
    counts = [f"{name} {matched[name]} of {len(own)}" for name, own in by_component(layers).items()]
    return f" ({', '.join(counts)})"


def bound_layers(
    layers: Mapping[str, LayerAdapter], modules: Mapping[str, nn.Module]
) -> dict[str, LayerAdapter]:
    """Give layers that depend on the base's weight a reference to it, where it lies there as plain numbers."""
    weights = dict(weights_of(layers, modules))
    return {
        name: layer.bound(weights[name]) if layer.needs_weight and name in weights else layer
        for name, layer in layers.items()
    }


def weights_of(
    layers: Mapping[str, LayerAdapter], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Tensor]]:
    """Give the base's weights and vectors that an adapter changes, where they lie there as plain numbers."""
    for component, own in by_component(layers).items():
        places = live_parameters(component, modules[component])
        for disk, layer in own.items():
            live, attribute = places[disk]
            weight: Any = getattr(modules[component].get_submodule(live), attribute, None)
            is_plain = isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta
            # a quantised weight is there in another shape
            if is_plain and shapes_agree(tuple(layer.shape), tuple(weight.shape)):
                yield f"{component}.{disk}", weight.detach()
