"""Adapters written the way other tools read them: kohya's file, diffusers' file, PEFT's folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmpeft import adapter_file
from mmpeft.adapter import Adapter, load_adapter
from mmpeft.base_modules import modules_of
from mmpeft.delta import check_truncation, truncate
from mmpeft.disk.safetensors_file import serialise
from mmpeft.disk.whole_writes import write_file, write_folder
from mmpeft.errors import AdapterError, ConfigError, MethodError
from mmpeft.injection import shapes
from mmpeft.key_formats import diffusers, kohya
from mmpeft.layer_adapter import LayerAdapter, by_component
from mmpeft.methods.dora import DoraLayer
from mmpeft.methods.lora import LoraLayer
from mmpeft.plugins import near_miss

Format = Literal["kohya", "diffusers", "peft"]
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Last levels of names that are convolutions in every model that has them.
_CONVOLUTIONS = ("conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut")


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        path: the file or folder.
        format: whose names.
        layers: number of layers by component.
        methods: number of layers by method, as written.
        errors: of each layer that was made LoRA, the share of its change that was lost (relative Frobenius error).
        notes: what a reader of the file will not do, a sentence each.
    """

    path: Path
    format: Format
    layers: Mapping[str, int]
    methods: Mapping[str, int]
    errors: Mapping[str, float]
    notes: tuple[str, ...]

    def text(self) -> str:
        """Give the report for a terminal."""
        components = ", ".join(f"{name} {count} layers" for name, count in self.layers.items())
        methods = ", ".join(f"{name} on {count}" for name, count in self.methods.items())
        lines = [f"wrote {self.path} in {self.format}'s form: {components} ({methods})"]
        if self.errors:
            worst = max(self.errors, key=lambda name: self.errors[name])
            lines.append(
                f"{len(self.errors)} layers were made LoRA, which loses up to {self.errors[worst]:.2%} of a layer's "
                f"change (in {worst})"
            )
        return "\n".join([*lines, *(f"mind: {note}" for note in self.notes)])


def export(
    adapter: Adapter | str | Path,
    path: str | Path,
    format: str = "kohya",  # noqa: A002 - the word of the public interface
    *,
    base: Any = None,
    rank: int | None = None,
    error: float | None = None,
    dtype: str | None = None,
) -> Path:
    """Write an adapter for another tool, with the same effect; see `write` for what each setting means.

    Returns:
        The file, or for PEFT and a diffusers path without ".safetensors" the folder.
    """
    return write(adapter, path, format, base=base, rank=rank, error=error, dtype=dtype).path


def write(
    adapter: Adapter | str | Path,
    path: str | Path,
    format: str = "kohya",  # noqa: A002 - the word of the public interface
    *,
    base: Any = None,
    rank: int | None = None,
    error: float | None = None,
    dtype: str | None = None,
) -> ExportReport:
    """Write an adapter for another tool, and say what was written.

    Args:
        adapter: an Adapter, or the path of what `load_adapter` reads.
        path: for kohya a .safetensors file (A1111 calls the adapter by its name); for diffusers one, or a folder that
            gets `pytorch_lora_weights.safetensors`; for PEFT a folder, with one more per component where there are
            several. An adapter that is there is replaced, anything else is left alone.
        format: "kohya" (A1111, ComfyUI), "diffusers" or "peft".
        base: what `load_adapter` takes; needed by layers whose change depends on the base's weights, once they are to
            be made LoRA, and by names of an unusual UNet.
        rank, error: make layers that are no LoRA into LoRA: of at most this rank, or of the smallest rank whose
            relative error is at most `error`. LoRA layers stay as they are.
        dtype: "fp32", "fp16" or "bf16"; none keeps the tensors as they are.

    Raises:
        ConfigError: an unknown format or dtype, a rank below 1, or an error that is no share.
        MethodError: layers that the format cannot hold.
        AdapterError: the adapter cannot be read, does not fit its base, or something else is at `path`.
    """
    chosen = _choose("format", format, get_args(Format))
    kind = _TYPES[_choose("dtype", dtype, tuple(_TYPES))] if dtype is not None else None
    check_truncation(rank=rank, error=error)
    modules = None if base is None else modules_of(base)
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter, modules)
    elif modules is not None:
        adapter = adapter.bound(modules)
    if not len(adapter):
        raise AdapterError("the adapter is empty; there is nothing to export")
    known = {} if modules is None else shapes(modules)
    errors: dict[str, float] = {}
    layers: dict[str, LayerAdapter] = {}
    for name, layer in adapter.items():
        layer = _in_shape(layer, known.get(name))
        if (rank is not None or error is not None) and layer.method != "lora" and len(layer.shape) > 1:
            layer, errors[name] = _as_lora(name, layer, rank, error)
        layers[name] = _cast(name, layer, kind)
    written = Adapter(layers, adapter.card)
    place = _write(written, Path(path), chosen, known)
    counts = Counter(name.split(".", 1)[0] for name in written)
    methods = Counter(layer.method for layer in written.values())
    return ExportReport(place, chosen, counts, methods, errors, tuple(_notes(written, chosen)))


def _choose(setting: str, given: str, known: Sequence[str]) -> Any:
    if given not in known:
        raise ConfigError(f"no {setting} is called {given!r}{near_miss(given, list(known))}")
    return given


def _as_lora(
    name: str, layer: LayerAdapter, rank: int | None, error: float | None
) -> tuple[LoraLayer, float]:
    """Give the closest LoRA of a layer's change, with its relative error."""
    if len(layer.shape) == 2 and name.rsplit(".", 1)[-1] in _CONVOLUTIONS:
        raise MethodError(
            f"{name} is a convolution whose kernel the file does not tell; give the base that it was trained on"
        )
    try:
        low_rank, lost = truncate(layer.delta(), rank=rank, error=error)
    except AdapterError as missing:
        raise MethodError(f"cannot make {name} LoRA: {missing}") from missing
    A = low_rank.lora_A.reshape(low_rank.rank, *low_rank.shape[1:])
    B = low_rank.lora_B.reshape(*low_rank.lora_B.shape, *[1] * (A.ndim - 2))
    return LoraLayer(A, B, float(low_rank.rank)), lost


def _in_shape(layer: LayerAdapter, shape: tuple[int, ...] | None) -> LayerAdapter:
    """Give LoRA's factors the weight's number of sides: some tools save a 1x1 convolution as a linear layer."""
    if shape is None or not isinstance(layer, LoraLayer) or tuple(layer.shape) == shape:
        return layer
    more: dict[str, Any] = {}
    if isinstance(layer, DoraLayer):
        sides = (1, shape[0], *[1] * (len(shape) - 2)) if len(shape) > 2 else (shape[0],)
        more["lora_magnitude_vector"] = layer.lora_magnitude_vector.reshape(sides)
    A = layer.lora_A.reshape(layer.rank, *shape[1:])
    B = layer.lora_B.reshape(shape[0], layer.rank, *[1] * (len(shape) - 2))
    return replace(layer, lora_A=A, lora_B=B, **more)


def _cast(name: str, layer: LayerAdapter, dtype: torch.dtype | None) -> LayerAdapter:
    """Give a layer adapter whose tensors of numbers have another type; what it is bound to stays."""
    if dtype is None:
        return layer
    changed: dict[str, Any] = {}
    for field in fields(layer):  # type: ignore[arg-type]  # all are dataclasses
        value = getattr(layer, field.name)
        if isinstance(value, LayerAdapter):
            changed[field.name] = _cast(name, value, dtype)
        elif isinstance(value, Tensor) and value.is_floating_point() and field.name != "base_weight":
            changed[field.name] = value.to(dtype)
            if not torch.isfinite(changed[field.name]).all():
                raise AdapterError(f"{name} has numbers too large for {dtype}; choose bf16 or fp32")
    return replace(layer, **changed)  # type: ignore[type-var]  # all are dataclasses


def _write(adapter: Adapter, path: Path, form: Format, base: Mapping[str, tuple[int, ...]]) -> Path:
    components = by_component(adapter)
    if form == "kohya":
        file = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
        data = serialise(*kohya.write(components, adapter.card, title=file.stem, base=base or None))
        return _put_file(file, data)
    try:
        if form == "diffusers":
            data = serialise(*diffusers.write(components))
            single = path.suffix == ".safetensors"
            return _put_file(path, data) if single else _put_folder(path, {adapter_file.WEIGHTS: data})
        return _put_folder(path, _peft_folders(components, adapter.card.base))
    except MethodError as error:
        raise MethodError(f"{error}; {_way_out(adapter)}") from error


def _peft_folders(components: Mapping[str, Mapping[str, LayerAdapter]], base: str) -> dict[str, bytes]:
    """Write PEFT's files by relative name: a folder per component, or none where there is one component."""
    return {
        f"{component}/{name}" if len(components) > 1 else name: data
        for component, layers in components.items()
        for name, data in adapter_file.peft_files(component, layers, base).items()
    }


def _way_out(adapter: Adapter) -> str:
    if vectors := [name for name, layer in adapter.items() if len(layer.shape) == 1]:
        return f"export as kohya, which also holds changed biases and norms ({len(vectors)} here, first {vectors[0]})"
    return "give rank or error to make such layers LoRA, with the error told, or export as kohya"


def _put_file(file: Path, data: bytes) -> Path:
    """Write a file in the place of nothing or of an adapter."""
    if file.exists() and not (file.is_file() and adapter_file.holds_adapter(file)):
        raise AdapterError(f"{file} is there and is no adapter; choose another name")
    write_file(file, data)
    return file


def _put_folder(folder: Path, contents: Mapping[str, bytes]) -> Path:
    """Write a folder in the place of nothing or of an export like it."""
    there = (
        {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        if folder.is_dir()
        else set()
    )
    if folder.is_file() or not there <= {str(Path(name)) for name in contents}:
        raise AdapterError(f"{folder} holds something else; choose another folder or empty this one")
    write_folder(folder, contents)
    return folder


def _notes(adapter: Adapter, form: Format) -> Iterator[str]:
    """Say what readers of a file are known not to do with it."""
    if form != "kohya":
        return
    methods = {layer.method for layer in adapter.values()}
    if "dora" in methods and "transformer" not in adapter.components:
        yield "diffusers leaves out dora_scale when it reads a kohya file of Stable Diffusion; give it diffusers' form"
    if others := sorted(methods - {"lora", "dora"}):
        yield f"diffusers and kohya's own networks.lora read no {', '.join(others)}; A1111, ComfyUI and LyCORIS do"
    alphas = {getattr(layer, "alpha", None) for layer in adapter.values()}
    if len(alphas) > 1 and "lora" in methods:
        yield "diffusers gives attention layers with an alpha of their own the wrong strength in kohya files"
