"""Adapters to disk and back; the only place that opens an adapter file.

The native folder loads in plain diffusers (`pipe.load_lora_weights(folder)`) and in plain PEFT:

    pytorch_lora_weights.safetensors   every component, diffusers' names, settings in the header
    adapter.json                       the card, for machines
    README.md                          the card, for people and the hub
    peft/<component>/                  adapter_config.json and adapter_model.safetensors

An adapter that diffusers cannot load (LoHa, LoKr, full differences, ...) has instead of the first

    lycoris.safetensors                LyCORIS's names, which A1111 and ComfyUI read, and in the header whose they are

and the last only where PEFT has a form for it.

Its bytes depend on the adapter alone. Nothing is unpickled, ever, and no tensor is read before the header was checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapter import Adapter, AdapterCard, LayerAdapter, shapes_agree
from mmpeft.backbones.pocket import pocket_folder
from mmpeft.errors import AdapterError, BaseError, BaseMismatch, FormatError, MethodError
from mmpeft.injection import COMPONENTS, live_layers, shapes, vector_layers
from mmpeft.key_formats import diffusers, kohya, peft
from mmpeft.model_card import model_card
from mmpeft.safetensors_file import PICKLES, read_header, read_tensors, serialise
from mmpeft.whole_writes import write_folder

WEIGHTS = "pytorch_lora_weights.safetensors"
LYCORIS_WEIGHTS = "lycoris.safetensors"
CARD = "adapter.json"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
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


def save(adapter: Adapter, folder: str | Path, files: Mapping[str, bytes] | None = None) -> Path:
    """Write the native folder, whole or not at all.

    Args:
        folder: made, or replaced if it holds an adapter already.
        files: further files of the artefact (preview images) by relative name; the model card shows pictures.

    Raises:
        AdapterError: the adapter is empty, has numbers that are not finite, or `folder` holds something else.
        MethodError: it has layers that neither diffusers nor LyCORIS has a form for.
    """
    folder, files = Path(folder), dict(files or {})
    if not len(adapter):
        raise AdapterError("the adapter is empty; there is nothing to save")
    for name, layer in adapter.items():
        _check_finite(f"cannot save {name}", layer.tensors)
    contents = _weights(adapter)
    contents[CARD] = _json({"format": 1, **asdict(adapter.card)})
    contents["README.md"] = model_card(adapter, sorted(files), WEIGHTS in contents).encode()
    if taken := sorted(contents.keys() & files.keys()):
        raise AdapterError(f"{taken[0]} is a file of the adapter itself; give yours another name")
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / CARD).is_file())):
        raise AdapterError(
            f"{folder} holds something that is no adapter; choose another folder or empty this one"
        )
    write_folder(folder, {**contents, **files})
    return folder


def _weights(adapter: Adapter) -> dict[str, bytes]:
    """Write the weights as diffusers and PEFT load them, else as LyCORIS does, and as PEFT does where that goes."""
    components = {component: adapter.component(component) for component in adapter.components}
    peft_folders, reason = {}, None
    try:
        for component, layers in components.items():
            for name, content in peft_files(component, layers, adapter.card.base).items():
                peft_folders[f"peft/{component}/{name}"] = content
    except MethodError as error:
        peft_folders, reason = {}, error
    try:
        return {WEIGHTS: serialise(*diffusers.write(components)), **peft_folders}
    except MethodError:
        pass
    try:
        return {LYCORIS_WEIGHTS: serialise(*kohya.write_with_names(components)), **peft_folders}
    except MethodError:
        if reason is not None or len(components) > 1:
            raise
        return peft_folders  # PEFT's own OFT has no other form


def peft_files(component: str, layers: Mapping[str, LayerAdapter], base: str) -> dict[str, bytes]:
    """Write one component's adapter as PEFT's two files, by name.

    Args:
        base: the base model's name, which PEFT's configuration states; "" for none.

    Raises:
        MethodError: layers that PEFT's LoRA cannot hold in one adapter.
    """
    tensors, config = peft.write(component, layers)
    config["base_model_name_or_path"] = base or None
    return {PEFT_WEIGHTS: serialise(tensors, {"format": "pt"}), PEFT_CONFIG: _json(config)}


def load(
    path: str | Path, base: Any = None, *, base_shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Adapter:
    """Read an adapter: a native, diffusers or PEFT folder, or a .safetensors file in their, kohya's or LyCORIS's names.

    Args:
        base: a pipeline, its folder, a module, or modules by component name. With it every layer must exist there
            in the same shape, a PEFT adapter finds its component, any name of kohya's can be read, and layers whose
            change depends on the base's weight know it; without it names are taken as they are.
        base_shapes: where the base is known by its files alone: what it has, by name on disk with the component. Names
            are read as with `base`; whether the adapter fits is left to the caller.

    Raises:
        AdapterError: there is no such file, or it is a pickle.
        FormatError: it is broken, or a key in it is unknown; the sentence names the key and the likely reason.
        BaseMismatch: it does not fit `base`.
    """
    file = weights_file(Path(path))
    modules = None if base is None else modules_of(base)
    there = base_shapes if modules is None else shapes(modules)
    layers = read_layers(file, *read_tensors(file), there, modules)
    for name, layer in layers.items():
        _check_finite(f"{file.name}: {name}", layer.tensors)
        _check_scale(f"{file.name}: {name}", layer)
    adapter = Adapter(layers, read_card(file))
    if modules is None:
        return adapter
    return bind(adapter, modules, file.name)


def holds_adapter(file: Path) -> bool:
    """Tell whether a file is an adapter of a known format, by its header alone."""
    try:
        keys, _ = read_header(file)
    except (AdapterError, OSError):
        return False
    return any(is_ours(keys) for is_ours in _FORMATS.values())


def bind(adapter: Adapter, modules: Mapping[str, nn.Module], title: str) -> Adapter:
    """Give an adapter whose layers know the weights of a base that it fits.

    Raises:
        BaseMismatch: it does not fit.
    """
    check_fits(adapter, modules, title)
    return Adapter(dict(bound_layers(adapter, modules)), adapter.card)


def read_layers(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    there: Mapping[str, tuple[int, ...]] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    *,
    keep_unknown: bool = False,
) -> dict[str, LayerAdapter]:
    """Turn a file's tensors into layer adapters by layer name, whoever's names they have; numbers are not looked at.

    Args:
        file: tells the format's other files, and errors what to call it.
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
    try:
        if len(found) > 1:
            examples = " and ".join(f"{name} {key!r}" for name, key in found.items())
            raise FormatError(f"keys of {len(found)} tools are mixed, {examples}; split the file by tool")
        if "PEFT's" in found:
            return _read_peft(file, tensors, there, modules, keep_unknown)
        if "kohya's" in found:
            return kohya.read(tensors, metadata, there, keep_unknown=keep_unknown)
        if "diffusers'" in found:
            return diffusers.read(tensors, metadata, there)
        raise FormatError(f"nothing in it is known: its keys look like {_likeness(tensors)}")
    except (FormatError, BaseMismatch) as error:
        raise type(error)(f"{file.name}: {error}") from error


def modules_of(base: Any) -> dict[str, nn.Module]:
    """Give the modules that can carry adapters, by component name, of a pipeline, its folder, a module or a mapping.

    Args:
        base: "pocket" is the embedded base's folder.

    Raises:
        AdapterError: there are none.
        BaseError: the folder cannot be opened.
    """
    if isinstance(base, str | Path):
        from diffusers import DiffusionPipeline

        base = pocket_folder() if base == "pocket" else base
        try:
            base = DiffusionPipeline.from_pretrained(base, local_files_only=True)
        except OSError as error:
            raise BaseError(f"cannot open the base {base}: it is no diffusers folder") from error
    if isinstance(base, nn.Module):
        kind = type(getattr(base, "_orig_mod", base)).__name__
        names = {"UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder"}
        return {names.get(kind, "transformer" if "Transformer" in kind else "language_model"): base}
    parts = base if isinstance(base, Mapping) else getattr(base, "components", {})
    found = {name: parts[name] for name in COMPONENTS if isinstance(parts.get(name), nn.Module)}
    if not found:
        raise AdapterError(f"{type(base).__name__} has no component that can carry adapters")
    return found


def check_fits(adapter: Adapter, modules: Mapping[str, nn.Module], title: str) -> dict[str, dict[str, str]]:
    """Check that every layer of an adapter exists in a base, in the same shape.

    Returns:
        By component: layer name on disk without the component -> live name of the module that has the weight or vector.

    Raises:
        BaseMismatch: it does not, with how many layers match.
    """
    found: dict[str, dict[str, str]] = {}
    matched, wrong = 0, []
    there = shapes({name: module for name, module in modules.items() if name in adapter.components})
    for component in adapter.components:
        places = _places(component, modules[component]) if component in modules else {}
        found[component] = {}
        for disk, layer in adapter.component(component).items():
            shape = there.get(f"{component}.{disk}")
            if shape is None:
                wrong.append(f"there is no {component}.{disk}")
            elif not shapes_agree(tuple(layer.shape), shape):
                wrong.append(f"{component}.{disk} has weight {shape}, the adapter's is {tuple(layer.shape)}")
            else:
                matched += 1
                found[component][disk] = places[disk][0]
    if wrong:
        trained_on = f" was trained on {adapter.card.base} and" if adapter.card.base else ""
        base = ", ".join(f"{name} ({type(module).__name__})" for name, module in sorted(modules.items()))
        raise BaseMismatch(
            f"{title}{trained_on} does not fit this base, {base}: {matched} of {len(adapter)} layers match; {wrong[0]}"
            f"{_by_component(adapter, found)}"
        )
    return found


def _by_component(adapter: Adapter, found: Mapping[str, Mapping[str, str]]) -> str:
    if len(found) == 1:
        return ""
    counts = [f"{name} {len(layers)} of {len(adapter.component(name))}" for name, layers in found.items()]
    return f" ({', '.join(counts)})"


def _places(component: str, model: nn.Module) -> dict[str, tuple[str, str]]:
    """Map names on disk of all that can be changed to (live module name, attribute)."""
    return {disk: (live, "weight") for disk, live in live_layers(component, model).items()} | dict(
        vector_layers(component, model)
    )


def bound_layers(adapter: Adapter, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, LayerAdapter]]:
    """Give layers that depend on the base's weight a reference to it, where it lies there as plain numbers."""
    weights = dict(weights_of(adapter, modules))
    for name, layer in adapter.items():
        yield name, layer.bound(weights[name]) if layer.needs_weight and name in weights else layer


def weights_of(adapter: Adapter, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Give the base's weights and vectors that an adapter changes, where they lie there as plain numbers."""
    for component in adapter.components:
        places = _places(component, modules[component])
        for disk, layer in adapter.component(component).items():
            live, attribute = places[disk]
            weight: Any = getattr(modules[component].get_submodule(live), attribute, None)
            is_plain = isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta
            # a quantised weight is there in another shape
            if is_plain and shapes_agree(tuple(layer.shape), tuple(weight.shape)):
                yield f"{component}.{disk}", weight.detach()


def weights_file(path: Path) -> Path:
    """Find the file with the weights of an adapter's folder; a file is its own.

    Raises:
        AdapterError: there is nothing, or only a pickle.
        FormatError: there is no adapter file, or several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise AdapterError(f"there is no adapter at {path}")
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    found = [name for name in names if name.endswith(".safetensors")]
    for name in [WEIGHTS, LYCORIS_WEIGHTS, PEFT_WEIGHTS] + (found if len(found) == 1 else []):
        if name in found:
            return path / name
    own = sorted(path.glob(f"peft/*/{PEFT_WEIGHTS}"))
    if len(own) == 1 and not found:
        return own[0]
    if found:
        raise FormatError(f"{path} has several adapter files; name one of {', '.join(found)}")
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise AdapterError(
            f"{path} has only {pickles[0]}, a pickle, which can run code; only .safetensors is read"
        )
    raise FormatError(f"{path} has no .safetensors file; it has {', '.join(names) or 'nothing'}")


def _read_peft(
    file: Path,
    tensors: Mapping[str, Tensor],
    there: Mapping[str, tuple[int, ...]] | None,
    modules: Mapping[str, nn.Module] | None,
    keep_unknown: bool,
) -> dict[str, LayerAdapter]:
    config_file = file.parent / PEFT_CONFIG
    if not config_file.is_file():
        raise FormatError(f"a PEFT file needs {PEFT_CONFIG} beside it, which holds alpha; there is none")
    config = _read_json(config_file)
    component = _peft_component(file, peft.layer_names(tensors), config, there)
    if component is None and not keep_unknown:
        raise FormatError(
            "it does not say which component it belongs to; give the base that it was trained on"
        )
    component = component or "model"
    names = _PeftNames(component, there)

    def bias_of(name: str) -> Tensor | None:
        place = _places(component, modules[component]).get(f"{names.on_disk(name)}.bias") if modules else None
        if place is None or modules is None:
            return None
        vector: Tensor = getattr(modules[component].get_submodule(place[0]), place[1]).detach()
        return vector

    has_component = modules is not None and component in modules
    layers = peft.read(tensors, config, names.shapes, bias_of if has_component else None)
    return {f"{component}.{names.on_disk(name)}": layer for name, layer in layers.items()}


def _peft_component(
    file: Path, names: Iterable[str], config: Mapping[str, Any], there: Mapping[str, tuple[int, ...]] | None
) -> str | None:
    """Tell which component a PEFT file belongs to: by its native folder, its configuration, its names or the base."""
    if file.parent.parent.name == "peft" and file.parent.name in COMPONENTS:
        return file.parent.name
    known = {name.partition(".")[0] for name in there or ()}
    component = peft.component_of(names, config)
    if len(known) == 1 and component not in known:
        (component,) = known
    return component


class _PeftNames:
    """The names of one component's layers in PEFT's files, which are live ones, and on disk."""

    def __init__(self, component: str, there: Mapping[str, tuple[int, ...]] | None) -> None:
        self._is_text = component.startswith("text_encoder")
        prefix = component + "."
        known = {name.removeprefix(prefix): s for name, s in (there or {}).items() if name.startswith(prefix)}
        live = {peft.live_of(name): shape for name, shape in known.items()} if self._is_text else {}
        self.shapes = None if there is None else known | live

    def on_disk(self, name: str) -> str:
        is_clip = self._is_text and name.startswith(("encoder.layers.", "final_layer_norm", "embeddings."))
        return f"text_model.{name}" if is_clip else name


def read_card(weights: Path) -> AdapterCard:
    """Read the card that lies beside a file of weights; an empty one where there is none.

    Raises:
        FormatError: it is broken.
    """
    folder = weights.parent
    file = (folder.parent.parent if folder.parent.name == "peft" else folder) / CARD
    if not file.is_file():
        return AdapterCard()
    known = {field.name for field in fields(AdapterCard)}
    values = {key: value for key, value in _read_json(file).items() if key in known}
    return AdapterCard(**{**values, "parents": tuple(values.get("parents") or ())})


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{file.name} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{file.name} is no JSON object")
    return data


def _check_finite(title: str, tensors: Mapping[str, Tensor]) -> None:
    for part, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            share = 1 - float(torch.isfinite(tensor).float().mean())
            raise FormatError(
                f"{title} has numbers that are not finite in {part} ({100 * share:.0f} % of them)"
            )


def _check_scale(title: str, layer: LayerAdapter) -> None:
    scale = getattr(layer, "scale", 1.0)
    if isinstance(scale, float | int) and not math.isfinite(scale):
        raise FormatError(f"{title} has alpha {getattr(layer, 'alpha', scale)}, which gives no finite change")


def _likeness(keys: Iterable[str]) -> str:
    keys = list(keys)
    for signs, words in _LIKENESSES.items():
        if any(sign in key for key in keys[:100] for sign in signs):
            return f"{words} (first {keys[0]!r})"
    return f"no adapter's (first {keys[0]!r})"


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
