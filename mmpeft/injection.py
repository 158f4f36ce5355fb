"""Find layers: names on disk resolved in a live module tree, and the layers that a recipe's patterns mean.

Names on disk outlive the libraries' refactorings: transformers 5 dropped the `text_model.` level of CLIP's live
module tree, while every adapter and checkpoint file keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

from mmpeft.errors import MethodError
from mmpeft.plugins import near_miss

COMPONENTS = (
    "unet",
    "transformer",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "language_model",
    "vision_tower",
    "projector",
)


def disk_name(component: str, live_name: str, model: nn.Module) -> str:
    """Give the name that a layer has on disk, without the component.

    Wrappers' levels are dropped: `_orig_mod` (torch.compile), `module` (data parallel), `base_model.model` (PEFT) and
    `base_layer` (an adapted layer).

    Args:
        component: the component that `model` is.
        live_name: the layer's name in `model`'s module tree.
    """
    parts = [part for part in live_name.split(".") if part not in ("_orig_mod", "base_layer")]
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        parts = parts[1:] if parts[0] == "module" else parts[2:]
    is_clip = getattr(getattr(model, "config", None), "model_type", None) == "clip_text_model"
    if is_clip and component.startswith("text_encoder") and parts[0] not in ("text_model", "text_projection"):
        parts.insert(0, "text_model")
    return ".".join(parts)


def live_layers(component: str, model: nn.Module) -> dict[str, str]:
    """Map the name on disk (without the component) of every layer that can be adapted to its live name.

    Of a layer that another library has wrapped, the live name is that of the layer inside. What wrappers add of their
    own is left out.
    """
    return {
        disk_name(component, live, model): live
        for live, module in _own_modules(model)
        if is_adaptable(module) and not _is_wrapper(module)
    }


def vector_layers(component: str, model: nn.Module) -> dict[str, tuple[str, Literal["weight", "bias"]]]:
    """Map the names on disk of a model's vectors to (live module name, attribute).

    A norm's gain is called as the norm is; a bias has ".bias" after the name of its layer or norm.
    """
    found: dict[str, tuple[str, Literal["weight", "bias"]]] = {}
    for live, module in _own_modules(model):
        if _is_wrapper(module):
            continue
        name = disk_name(component, live, model)
        if _is_vector(module, "weight"):
            found[name] = (live, "weight")
        if _is_vector(module, "bias"):
            found[f"{name}.bias"] = (live, "bias")
    return found


def live_parameters(component: str, model: nn.Module) -> dict[str, tuple[str, Literal["weight", "bias"]]]:
    """Map the names on disk of everything that an adapter can change to (live module name, attribute)."""
    layers: dict[str, tuple[str, Literal["weight", "bias"]]] = {
        disk: (live, "weight") for disk, live in live_layers(component, model).items()
    }
    return layers | vector_layers(component, model)


def vectors_of(component: str, model: nn.Module) -> dict[str, Tensor]:
    """Give a model's biases and norms' gains by name on disk without the component, by reference."""
    return {
        disk: getattr(model.get_submodule(live), attribute).detach()
        for disk, (live, attribute) in vector_layers(component, model).items()
    }


def shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Give the shape of everything that an adapter can change, by name on disk with the component in front.

    Args:
        modules: by component.
    """
    found: dict[str, tuple[int, ...]] = {}
    for component, model in modules.items():
        for disk, live in live_layers(component, model).items():
            found[f"{component}.{disk}"] = weight_shape(model.get_submodule(live))
        for disk, (live, attribute) in vector_layers(component, model).items():
            found[f"{component}.{disk}"] = tuple(getattr(model.get_submodule(live), attribute).shape)
    return found


def is_adaptable(module: nn.Module) -> bool:
    """Tell whether a weight change of the layer is defined: linear and ungrouped 2-D convolution.

    Linear layers are known by their attributes, so that quantised ones of every library count.
    """
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight and never calls it
    sized = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    return sized and (hasattr(module, "weight") or hasattr(module, "qweight")) and not any(module.children())


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Give the shape of an adaptable layer's weight, as it is before any quantisation."""
    if isinstance(module, nn.Conv2d):
        return (module.out_channels, module.in_channels, *module.kernel_size)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def matches(name: str, pattern: str) -> bool:
    """Tell whether a name on disk is meant by a pattern with * and ?, which may leave out leading levels."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, "*." + pattern)


def find_targets(
    component: str, model: nn.Module, groups: Mapping[str, tuple[str, ...]], targets: Sequence[str]
) -> dict[str, str]:
    """Find the layers that a recipe's targets mean.

    Args:
        component: the component that `model` is.
        groups: the backbone's groups of layers: name -> patterns. A group counts as a whole: some of its patterns may
            match nothing, since it also serves other components.
        targets: names of groups, groups joined with + ("attention+mlp"), or patterns on names on disk with * and ?.
            Leading levels may be left out ("to_q"); with a component in front ("unet.*.to_q") a pattern speaks of that
            component alone.

    Returns:
        Live name -> name on disk without the component, in the order of the module tree.

    Raises:
        MethodError: a target matches no layer, or also weights that no method can adapt (embeddings, fused experts).
    """
    weights = {disk_name(component, live, model): module for live, module in _own_weights(model)}
    chosen: set[str] = set()
    for target in targets:
        patterns = _patterns(component, target, groups, weights)
        if patterns is None:
            continue
        hits = [name for name in weights if any(matches(name, pattern) for pattern in patterns)]
        missed = [name for name in hits if weights[name] is None]
        if not hits:
            known = [
                *groups,
                *sorted({name.rsplit(".", 1)[-1] for name in weights if weights[name] is not None}),
            ]
            raise MethodError(
                f"the target {target!r} matches no layer of {component}{near_miss(target.rsplit('.', 1)[-1], known)}"
            )
        if missed:
            raise MethodError(
                f"the target {target!r} can be adapted only in part: {len(missed)} of the {len(hits)} weights that it "
                f"matches in {component} ({100 * len(missed) / len(hits):.0f} %) are no linear layer or plain 2-D "
                f"convolution, first {missed[0]!r}; name the layers more closely"
            )
        chosen.update(hits)
    if not chosen:
        raise MethodError(f"no target speaks of {component}; got {list(targets)}")
    return {live: disk for disk, live in live_layers(component, model).items() if disk in chosen}


def _patterns(
    component: str, target: str, groups: Mapping[str, tuple[str, ...]], weights: Mapping[str, object]
) -> tuple[str, ...] | None:
    """Resolve a target into patterns; None for one that speaks of another component."""
    if target in groups:
        return groups[target]
    parts = target.split("+")
    if len(parts) > 1 and all(part in groups for part in parts):
        return tuple(pattern for part in parts for pattern in groups[part])
    first, _, rest = target.partition(".")
    if first in COMPONENTS and rest and not any(name.startswith(first + ".") for name in weights):
        return (rest,) if first == component else None
    return (target,)


def _own_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    """Give each matrix-like weight of the base: (layer name, layer), or (parameter name, None) if not adaptable."""
    for live, module in _own_modules(model):
        if _is_wrapper(module):
            continue
        if is_adaptable(module):
            yield live, module
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:  # norms and biases are vectors, and no pattern on layers means them
                yield (live if parameter_name == "weight" else f"{live}.{parameter_name}"), None


def _own_modules(
    module: nn.Module, name: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Walk the base's modules, each once: below a wrapper only into what it wraps."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child_name, child in module.named_children():
        if child_name == "base_layer" or not _is_wrapper(module):
            yield from _own_modules(child, f"{name}.{child_name}" if name else child_name, seen)


def _is_vector(module: nn.Module, attribute: str) -> bool:
    vector = getattr(module, attribute, None)
    if not isinstance(vector, Tensor) or vector.ndim != 1:
        return False
    # packed weights of quantised layers are vectors of bytes
    return vector.is_floating_point() and not (attribute == "weight" and is_adaptable(module))


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module)
