"""Adapters to disk and back; the only place that opens an adapter file.

The native folder loads in plain diffusers (`pipe.load_lora_weights(folder)`) and in plain PEFT:

    pytorch_lora_weights.safetensors   every component, diffusers' names, settings in the header
    adapter.json                       the card, for machines
    README.md                          the card, for people and the hub
    peft/<component>/                  adapter_config.json and adapter_model.safetensors

Its bytes depend on the adapter alone. Nothing is unpickled, ever, and no tensor is read before the header was checked.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mmpeft.adapter import Adapter, AdapterCard, LayerAdapter
from mmpeft.errors import AdapterError, BaseError, BaseMismatch, FormatError
from mmpeft.injection import COMPONENTS, live_layers, weight_shape
from mmpeft.key_formats import diffusers, peft
from mmpeft.model_card import model_card

WEIGHTS = "pytorch_lora_weights.safetensors"
CARD = "adapter.json"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# What the first keys of other tools' files look like, to say so.
_LIKENESSES = {
    ("lora_unet_", "lora_te", "lycoris_"): "kohya's or LyCORIS's; convert the file to diffusers' names first",
    ("hada_w", "lokr_w", "oft_blocks", "oft_diag"): "those of LoHa, LoKr or OFT, which are not read",
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
        MethodError: it has layers that diffusers cannot load.
    """
    folder, files = Path(folder), dict(files or {})
    if not len(adapter):
        raise AdapterError("the adapter is empty; there is nothing to save")
    for name, layer in adapter.items():
        _check_finite(f"cannot save {name}", layer.tensors)
    components = {component: adapter.component(component) for component in adapter.components}
    contents: dict[str, bytes] = {WEIGHTS: _serialise(*diffusers.write(components))}
    for component, layers in components.items():
        tensors, config = peft.write(component, layers)
        config["base_model_name_or_path"] = adapter.card.base or None
        contents[f"peft/{component}/{PEFT_WEIGHTS}"] = _serialise(tensors, {"format": "pt"})
        contents[f"peft/{component}/{PEFT_CONFIG}"] = _json(config)
    contents[CARD] = _json({"format": 1, **asdict(adapter.card)})
    contents["README.md"] = model_card(adapter, sorted(files)).encode()
    if taken := sorted(contents.keys() & files.keys()):
        raise AdapterError(f"{taken[0]} is a file of the adapter itself; give yours another name")
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / CARD).is_file())):
        raise AdapterError(
            f"{folder} holds something that is no adapter; choose another folder or empty this one"
        )
    _write_whole(folder, {**contents, **files})
    return folder


def load(path: str | Path, base: Any = None) -> Adapter:
    """Read an adapter: a native, diffusers or PEFT folder, or a .safetensors file in diffusers' or PEFT's names.

    Args:
        base: a pipeline, its folder, a module, or modules by component name. With it every layer must exist there
            in the same shape, and a PEFT adapter finds its component; without it names are taken as they are.

    Raises:
        AdapterError: there is no such file, or it is a pickle.
        FormatError: it is broken, or a key in it is unknown; the sentence names the key and the likely reason.
        BaseMismatch: it does not fit `base`.
    """
    path = Path(path)
    file = weights_file(path)
    tensors, metadata = read_tensors(file)
    try:
        if peft.is_ours(tensors):
            adapter = Adapter(_read_peft(file, tensors, base))
        elif diffusers.is_ours(tensors):
            adapter = Adapter(diffusers.read(tensors, metadata))
        else:
            raise FormatError(f"nothing in it is known: its keys look like {_likeness(tensors)}")
    except FormatError as error:
        raise FormatError(f"{file.name}: {error}") from error
    for name, layer in adapter.items():
        _check_finite(f"{file.name}: {name}", layer.tensors)
    adapter.card = _read_card(file.parent)
    if base is not None:
        check_fits(adapter, modules_of(base), file.name)
    return adapter


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file after checking its header against the file's size.

    Returns:
        The tensors by key, on the CPU in the file's types, and the header's metadata.

    Raises:
        AdapterError: it is a pickle by name or content.
        FormatError: it is empty, truncated, or its header is broken.
    """
    if file.suffix.lower() in _PICKLES:
        raise AdapterError(
            f"{file.name} is a pickle, which can run code when opened; only .safetensors is read"
        )
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        is_oversized = length > min(_HEADER_LIMIT, size - 8)
        # torch.save writes a zip, or before 1.6 a bare pickle; the first bytes of both read as an absurd header length
        if start[:4] == b"PK\x03\x04" or (is_oversized and start[:1] == b"\x80"):
            raise AdapterError(f"{file.name} is a pickle under another name; only .safetensors is read")
        if size < 10:
            raise FormatError(
                f"{file.name} is empty" if size == 0 else f"{file.name} is truncated: {size} bytes"
            )
        if is_oversized:
            raise FormatError(
                f"{file.name} is truncated or no safetensors file: its header claims {length:,} bytes of {size:,}"
            )
        header = stream.read(length)
    metadata = _check_header(file.name, header, size - 8 - length)
    try:
        return safetensors.torch.load_file(file), metadata
    except safetensors.SafetensorError as error:
        raise FormatError(f"{file.name} is no valid safetensors file: {error}") from error


def modules_of(base: Any) -> dict[str, nn.Module]:
    """Give the modules that can carry adapters, by component name, of a pipeline, its folder, a module or a mapping.

    Raises:
        AdapterError: there are none.
        BaseError: the folder cannot be opened.
    """
    if isinstance(base, str | Path):
        from diffusers import DiffusionPipeline

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
        By component: layer name on disk without the component -> live name.

    Raises:
        BaseMismatch: it does not, with how many layers match.
    """
    found: dict[str, dict[str, str]] = {}
    matched, wrong = 0, []
    for component in adapter.components:
        model = modules.get(component)
        live = live_layers(component, model) if model is not None else {}
        found[component] = {}
        for disk, layer in adapter.component(component).items():
            shape = (
                weight_shape(model.get_submodule(live[disk])) if model is not None and disk in live else None
            )
            if shape is None:
                wrong.append(f"there is no {component}.{disk}")
            elif not _same_layer(tuple(layer.shape), shape):
                wrong.append(f"{component}.{disk} has weight {shape}, the adapter's is {tuple(layer.shape)}")
            else:
                matched += 1
                found[component][disk] = live[disk]
    if wrong:
        trained_on = f" was trained on {adapter.card.base} and" if adapter.card.base else ""
        there = ", ".join(f"{name} ({type(module).__name__})" for name, module in sorted(modules.items()))
        raise BaseMismatch(
            f"{title}{trained_on} does not fit this base, {there}: {matched} of {len(adapter)} layers match; {wrong[0]}"
        )
    return found


def _same_layer(ours: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    # some tools save 1x1 convolutions as linear layers
    return ours == weight or (len(ours) == 2 and weight[2:] == (1, 1) and ours == weight[:2])


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
    for name in [WEIGHTS, PEFT_WEIGHTS] + (found if len(found) == 1 else []):
        if name in found:
            return path / name
    if found:
        raise FormatError(f"{path} has several adapter files; name one of {', '.join(found)}")
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise AdapterError(
            f"{path} has only {pickles[0]}, a pickle, which can run code; only .safetensors is read"
        )
    raise FormatError(f"{path} has no .safetensors file; it has {', '.join(names) or 'nothing'}")


def _read_peft(file: Path, tensors: Mapping[str, Tensor], base: Any) -> dict[str, LayerAdapter]:
    config_file = file.parent / PEFT_CONFIG
    if not config_file.is_file():
        raise FormatError(f"a PEFT file needs {PEFT_CONFIG} beside it, which holds alpha; there is none")
    config = _read_json(config_file)
    layers = peft.read(tensors, config)
    in_native_folder = file.parent.parent.name == "peft" and file.parent.name in COMPONENTS
    component = file.parent.name if in_native_folder else peft.component_of(layers, config)
    modules = modules_of(base) if base is not None else {}
    if component is None and len(modules) == 1:
        component = next(iter(modules))
    if component is None:
        raise FormatError(
            "it does not say which component it belongs to; give the base that it was trained on"
        )
    restored = {
        f"text_model.{name}" if component == "text_encoder" and name.startswith("encoder.") else name: layer
        for name, layer in layers.items()
    }
    return {f"{component}.{name}": layer for name, layer in restored.items()}


def _read_card(folder: Path) -> AdapterCard:
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


def _check_header(name: str, header: bytes, data_size: int) -> dict[str, str]:
    """Check types, shapes and places of all tensors; give the metadata."""
    try:
        entries = json.loads(header)
        metadata = {str(k): str(v) for k, v in entries.pop("__metadata__", {}).items()}
        places = []
        for key, entry in entries.items():
            begin, end = entry["data_offsets"]
            count = 1
            for side in entry["shape"]:
                count *= side
            if entry["dtype"] not in _DTYPES:
                raise FormatError(f"{name}: {key!r} has type {entry['dtype']}, which no adapter has")
            if not 0 <= begin <= end or end - begin != count * _DTYPES[entry["dtype"]]:
                raise FormatError(f"{name}: the header contradicts itself about {key!r}")
            places.append((begin, end))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"{name} is no safetensors file: its header is no valid JSON table") from error
    if not entries:
        raise FormatError(f"{name} holds no tensors")
    needed = max(end for _, end in places)
    if needed > data_size:
        raise FormatError(f"{name} is truncated: its tensors need {needed:,} bytes, {data_size:,} are there")
    return metadata


def _check_finite(title: str, tensors: Mapping[str, Tensor]) -> None:
    for part, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            share = 1 - float(torch.isfinite(tensor).float().mean())
            raise FormatError(
                f"{title} has numbers that are not finite in {part} ({100 * share:.0f} % of them)"
            )


def _likeness(keys: Iterable[str]) -> str:
    keys = list(keys)
    for signs, words in _LIKENESSES.items():
        if any(sign in key for key in keys[:100] for sign in signs):
            return f"{words} (first {keys[0]!r})"
    return f"no adapter's (first {keys[0]!r})"


def _serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Write safetensors bytes with everything sorted; the library's own writer orders metadata at random."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks: list[bytes] = []
    place = 0
    # wide types first, so that every tensor is aligned, as the library does it
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        plain = tensor.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[key] = {
            "dtype": _DTYPE_NAMES[plain.dtype],
            "shape": list(plain.shape),
            "data_offsets": [place, place + len(data)],
        }
        place += len(data)
        chunks.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *chunks])


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _write_whole(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a new folder beside, then put it in the place of `folder` by renaming."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh = beside / "new"
        for name, content in sorted(contents.items()):
            file = fresh / name
            if not file.resolve().is_relative_to(fresh.resolve()):
                raise AdapterError(f"{name} would lie outside the adapter's folder")
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        if folder.exists():
            folder.rename(beside / "old")
        try:
            fresh.rename(folder)
        except OSError:
            if (beside / "old").exists():
                (beside / "old").rename(folder)
            raise
    except OSError as error:
        raise AdapterError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
