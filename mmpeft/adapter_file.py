"""Layer adapters and their card to disk and back; the only place that opens an adapter file.

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
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmpeft.adapter_card import AdapterCard
from mmpeft.disk.json_files import read_object
from mmpeft.disk.safetensors_file import PICKLES, read_header, read_tensors, serialise
from mmpeft.disk.whole_writes import write_folder
from mmpeft.errors import AdapterError, BaseMismatch, FormatError, MethodError
from mmpeft.injection import COMPONENTS
from mmpeft.key_formats import diffusers, kohya, peft, recognition
from mmpeft.layer_adapter import LayerAdapter, by_component
from mmpeft.model_card import model_card

WEIGHTS = "pytorch_lora_weights.safetensors"
LYCORIS_WEIGHTS = "lycoris.safetensors"
CARD = "adapter.json"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_FILE = re.compile(rf"peft/[^/]+/({re.escape(PEFT_WEIGHTS)}|{re.escape(PEFT_CONFIG)})")


def save(
    layers: Mapping[str, LayerAdapter],
    card: AdapterCard,
    folder: str | Path,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the native folder, whole or not at all.

    Args:
        layers: by layer name with the component in front.
        folder: made, or replaced if it holds an adapter already.
        files: further files of the artefact (preview images) by relative name; the model card shows pictures.

    Raises:
        AdapterError: the adapter is empty, has numbers that are not finite, or `folder` holds something else, be it
            beside an adapter.
        MethodError: it has layers that neither diffusers nor LyCORIS has a form for.
    """
    folder, files = Path(folder), dict(files or {})
    if not layers:
        raise AdapterError("the adapter is empty; there is nothing to save")
    for name, layer in layers.items():
        layer.check_finite(f"cannot save: {name}")
    contents = _weights(by_component(layers), card.base)
    contents[CARD] = _json({"format": 1, **asdict(card)})
    contents["README.md"] = model_card(layers, card, sorted(files), WEIGHTS in contents).encode()
    if taken := sorted(contents.keys() & files.keys()):
        raise AdapterError(f"{taken[0]} is a file of the adapter itself; give yours another name")
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / CARD).is_file())):
        raise AdapterError(
            f"{folder} holds something that is no adapter; choose another folder or empty this one"
        )
    if strange := sorted(_strange_files(folder) - files.keys()):
        raise AdapterError(
            f"{folder} holds {strange[0]} beside an adapter, which replacing the folder would lose; move it, or choose "
            f"another folder"
        )
    write_folder(folder, {**contents, **files})
    return folder


def _strange_files(folder: Path) -> set[str]:
    """Find what lies in an adapter's folder and was not written with an adapter; its page names its pictures."""
    page = folder / "README.md"
    told = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    return {
        name
        for name in found - {WEIGHTS, LYCORIS_WEIGHTS, CARD, page.name}
        if not _PEFT_FILE.fullmatch(name) and f"![{name}]({name})" not in told
    }


def _weights(components: Mapping[str, Mapping[str, LayerAdapter]], base: str) -> dict[str, bytes]:
    """Write the weights as diffusers and PEFT load them, else as LyCORIS does, and as PEFT does where that goes."""
    peft_folders, reason = {}, None
    try:
        for component, layers in components.items():
            for name, content in peft_files(component, layers, base).items():
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


def read(
    file: Path,
    there: Mapping[str, tuple[int, ...]] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> tuple[dict[str, LayerAdapter], AdapterCard]:
    """Read the layer adapters in a file by layer name, and the card beside it, and check their numbers.

    Args:
        file: as `weights_file` finds it.
        there, modules: as `read_layers` takes them.

    Raises:
        AdapterError: it is a pickle.
        FormatError: it is broken, a key in it is unknown, or it holds numbers that are not finite.
        BaseMismatch: names that the base does not have.
    """
    layers = read_layers(file, *read_tensors(file), there, modules)
    for name, layer in layers.items():
        layer.check_finite(f"{file.name}: {name}")
        _check_scale(f"{file.name}: {name}", layer)
        _check_types(f"{file.name}: {name}", layer)
    return layers, read_card(file)


def holds_adapter(file: Path) -> bool:
    """Tell whether a file is an adapter of a known format, by its header alone."""
    try:
        keys, _ = read_header(file)
    except (AdapterError, OSError):
        return False
    return recognition.is_known(keys)


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
        there, modules, keep_unknown: as `recognition.read` takes them.

    Raises:
        FormatError: a key is unknown, or keys of several tools are mixed.
        BaseMismatch: names that the base does not have.
    """
    is_native = file.parent.parent.name == "peft" and file.parent.name in COMPONENTS

    def peft_config() -> dict[str, Any]:
        config = file.parent / PEFT_CONFIG
        if not config.is_file():
            raise FormatError(f"a PEFT file needs {PEFT_CONFIG} beside it, which holds alpha; there is none")
        return read_object(config, FormatError)

    component = file.parent.name if is_native else None
    try:
        return recognition.read(
            tensors, metadata, peft_config, component, there, modules, keep_unknown=keep_unknown
        )
    except (FormatError, BaseMismatch) as error:
        raise type(error)(f"{file.name}: {error}") from error


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
    values = {key: value for key, value in read_object(file, FormatError).items() if key in known}
    parents = values.get("parents") or []
    if not isinstance(parents, list):
        raise FormatError(f"{CARD} has parents {str(parents)[:80]!r}; a list is needed")
    return AdapterCard(**{**values, "parents": tuple(parents)})


def _check_types(title: str, layer: LayerAdapter) -> None:
    for part, tensor in layer.tensors.items():
        if not tensor.is_floating_point() and part != "rest_indices":
            raise FormatError(f"{title} has {part} of type {tensor.dtype}; fractions are needed")


def _check_scale(title: str, layer: LayerAdapter) -> None:
    scale = getattr(layer, "scale", 1.0)
    if isinstance(scale, float | int) and not math.isfinite(scale):
        raise FormatError(f"{title} has alpha {getattr(layer, 'alpha', scale)}, which gives no finite change")


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
