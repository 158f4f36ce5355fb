"""What an adapter holds, read from its files alone, or with its base where the method needs it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from mmpeft import adapter_file
from mmpeft.adapter import Adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.backbones.fingerprint import Fingerprint
from mmpeft.base_modules import modules_of, weights_of
from mmpeft.composition.lineage import describe
from mmpeft.disk.safetensors_file import read_tensors
from mmpeft.errors import AdapterError
from mmpeft.injection import shapes
from mmpeft.key_formats import kohya, peft
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.lora import LoraLayer

# A layer is called odd when its change is so many times the typical one of its component, or that much below.
FAR_FROM_THE_REST = 20.0
# Layers that the text names; `as_dict` has all.
_SHOWN = 5

# Header keys that the text shows; `as_dict` has all.
_SHOWN_METADATA = (
    "modelspec.title",
    "modelspec.architecture",
    "modelspec.trigger_phrase",
    "modelspec.prediction_type",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
# Entries of a dense change that are not built just to measure it; the largest layer of a known model has a quarter.
_MOST_ENTRIES = 2**28

Format = Literal["native folder", "PEFT", "diffusers", "kohya", "LyCORIS"]


@dataclass(frozen=True)
class LayerReport:
    """One layer of an adapter.

    Attributes:
        name: on disk, with the component in front.
        method: lora, dora, ...
        shape: of the base's weight.
        rank, alpha, scale: as saved; None for a method without.
        norm: Frobenius norm of the change; None where it depends on the base's weight, or is not finite.
        relative: `norm` over the norm of the base's weight; None where neither base nor card tells that.
        entries: numbers saved for this layer.
        broken: tensors that have numbers that are not finite, with their share.
    """

    name: str
    method: str
    shape: tuple[int, ...]
    rank: int | None
    alpha: float | None
    scale: float | None
    norm: float | None
    relative: float | None
    entries: int
    broken: Mapping[str, float]


@dataclass(frozen=True)
class AdapterReport:
    """What `inspect` found.

    Attributes:
        file: name of the file with the weights.
        format: how it is written.
        file_bytes: size of that file.
        components: number of layers by component.
        layers: in the order of their names.
        card: what adapter.json says; empty where there is none.
        metadata: the file's header.
        health: what looks wrong, a sentence each; empty when all is well.
    """

    file: str
    format: Format
    file_bytes: int
    components: Mapping[str, int]
    layers: tuple[LayerReport, ...]
    card: AdapterCard
    metadata: Mapping[str, str]
    health: tuple[str, ...]

    @property
    def total_norm(self) -> float | None:
        """Frobenius norm of the change of all layers together; None if some layer's is not known."""
        norms = [layer.norm for layer in self.layers]
        return None if None in norms else math.hypot(*(norm for norm in norms if norm is not None))

    def as_dict(self) -> dict[str, Any]:
        """Give the whole report in JSON types."""
        card = {
            key: value for key, value in asdict(self.card).items() if key not in ("fingerprint", "embedding")
        }
        fingerprint = self.card.fingerprint or {}
        return {
            "file": self.file,
            "format": self.format,
            "file_bytes": self.file_bytes,
            "components": dict(self.components),
            "total_norm": self.total_norm,
            "layers": [asdict(layer) for layer in self.layers],
            "fingerprint": {
                "prediction": fingerprint.get("prediction"),
                "layers": len(fingerprint.get("layers", {})),
            },
            "card": card,
            "metadata": dict(self.metadata),
            "health": list(self.health),
        }

    def text(self) -> str:
        """Give the report for a terminal."""
        card = self.card
        entries = sum(layer.entries for layer in self.layers)
        lines = [f"{self.file}: {self.format}, {self.file_bytes:,} bytes, {entries:,} numbers"]
        lines += [f"{name}: {count} layers" for name, count in self.components.items()]
        lines.append(f"method: {_counted(layer.method for layer in self.layers)}")
        for name in ("rank", "alpha", "scale"):
            values = [getattr(layer, name) for layer in self.layers if getattr(layer, name) is not None]
            if values:
                lines.append(f"{name}: {_counted(f'{value:g}' for value in values)}")
        lines += ["", *self._norm_lines(), ""]
        sketch = Fingerprint.from_json(card.fingerprint) if card.fingerprint else None
        known = f"{len(sketch.layers)} layers of a base that predicts {sketch.prediction}" if sketch else None
        facts = {
            "base": card.base,
            "fingerprint": known or "none; a wrong base is known by its shapes alone",
            "trigger": card.trigger,
            "steps": card.steps,
            "seed": card.seed,
            "data": card.data_digest,
            "composed from": "; ".join(f"{p.get('weight')} of {describe(p)}" for p in card.parents),
            "figures": ", ".join(f"{name} {_short(value)}" for name, value in card.metrics.items()),
            **{key: self.metadata.get(key) for key in _SHOWN_METADATA},
            "more in the header": ", ".join(sorted(self.metadata.keys() - set(_SHOWN_METADATA))),
        }
        lines += [f"{name}: {value}" for name, value in facts.items() if value not in (None, "")]
        lines += ["", *(f"look at this: {sentence}" for sentence in self.health)]
        return "\n".join(lines if self.health else [*lines, "health: nothing looks wrong"])

    def _norm_lines(self) -> list[str]:
        known = [layer for layer in self.layers if layer.norm is not None]
        if not known:
            return ["the size of the change depends on the base's weights"]
        total = self.total_norm
        head = (
            "largest changes" if total is None else f"norm of the whole change: {total:.4g}; largest changes"
        )
        largest = sorted(known, key=lambda layer: -(layer.norm or 0))[:_SHOWN]
        width = max(len(layer.name) for layer in largest)
        lines = [f"{head}:"]
        for layer in largest:
            share = "" if layer.relative is None else f"  {layer.relative:.1%} of the weight"
            lines.append(f"  {layer.name:<{width}}  {layer.norm:.4g}{share}")
        return lines


def inspect(path: str | Path, base: Any = None) -> AdapterReport:
    """Read an adapter and say what is in it: method, ranks, norms, base, and whether it is sound.

    Numbers that are not finite, which `load_adapter` refuses, are told. Names that only the base can tell stay as they
    are in the file.

    Args:
        path: a folder or a .safetensors file in a format that `load_adapter` reads.
        base: what `load_adapter` takes; with it the norms of methods that depend on its weights are known.

    Raises:
        AdapterError: there is no such file, or it is a pickle.
        FormatError: it is broken, or in no format that is known.
        BaseMismatch: it does not fit `base`.
    """
    file = adapter_file.weights_file(Path(path))
    modules = None if base is None else modules_of(base)
    tensors, metadata = read_tensors(file)
    there = None if modules is None else shapes(modules)
    found = adapter_file.read_layers(file, tensors, metadata, there, modules, keep_unknown=modules is None)
    adapter = Adapter(found, adapter_file.read_card(file))
    if modules is not None:
        adapter = adapter.bound(modules, file.name)
    layers = tuple(_layers(adapter, _weight_norms(adapter, modules)))
    return AdapterReport(
        file=file.name,
        format=_format(file, tensors),
        file_bytes=file.stat().st_size,
        components=Counter(name.split(".", 1)[0] for name in adapter.layers),
        layers=layers,
        card=adapter.card,
        metadata=metadata,
        health=tuple(_health(layers)),
    )


def _format(file: Path, keys: Iterable[str]) -> Format:
    keys = list(keys)
    names = (adapter_file.WEIGHTS, adapter_file.LYCORIS_WEIGHTS)
    if file.name in names and (file.parent / adapter_file.CARD).is_file():
        return "native folder"
    if peft.is_ours(keys):
        return "PEFT"
    if not kohya.is_ours(keys):
        return "diffusers"
    is_plain = all(
        key.startswith("lora_") and key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha"))
        for key in keys
    )
    return "kohya" if is_plain else "LyCORIS"


def _weight_norms(adapter: Adapter, modules: Mapping[str, Any] | None) -> dict[str, float]:
    """Give the norms of the base's weights, from the base where it is known, else from the card."""
    if modules is None:
        fingerprint = adapter.card.fingerprint
        sketches = Fingerprint.from_json(fingerprint).layers if fingerprint else {}
        return {name: sketch.norm for name, sketch in sketches.items()}
    weights = weights_of(adapter, modules)
    return {name: float(weight.float().norm()) for name, weight in weights}


def _layers(adapter: Adapter, weight_norms: Mapping[str, float]) -> Iterator[LayerReport]:
    for name, layer in adapter.items():
        broken = {
            part: 1 - float(torch.isfinite(tensor).float().mean())
            for part, tensor in layer.tensors.items()
            if not torch.isfinite(tensor).all()
        }
        norm = None if broken else _norm(layer)
        weight_norm = weight_norms.get(name)
        yield LayerReport(
            name=name,
            method=layer.method,
            shape=tuple(layer.shape),
            rank=getattr(layer, "rank", None),
            alpha=getattr(layer, "alpha", None),
            scale=getattr(layer, "scale", None),
            norm=norm,
            relative=norm / weight_norm if norm is not None and weight_norm else None,
            entries=sum(tensor.numel() for tensor in layer.tensors.values()),
            broken=broken,
        )


def _norm(layer: LayerAdapter) -> float | None:
    if prod(layer.shape) > _MOST_ENTRIES and not isinstance(layer, LoraLayer):
        return None
    try:
        norm = layer.delta().norm()
    except AdapterError:  # the method needs the base's weight
        return None
    return norm if math.isfinite(norm) else None


def _health(layers: Sequence[LayerReport]) -> Iterator[str]:
    if broken := [layer.name for layer in layers if layer.broken]:
        worst = max(share for layer in layers for share in layer.broken.values())
        yield (
            f"numbers that are not finite, up to {worst:.0%} of a tensor, in {_some(broken)}: the adapter cannot be "
            f"loaded"
        )
    dead = [layer.name for layer in layers if layer.norm == 0]
    if len(dead) == len(layers):
        yield "every layer's change is zero: the adapter does nothing, as before the first training step"
    elif dead:
        yield f"{_some(dead)} of {len(layers)} layers change nothing: their change is zero"
    strong = [layer.name for layer in layers if (layer.relative or 0) > 1]
    if strong:
        yield f"the change is larger than the base's weight in {_some(strong)}; try a lower learning rate"
    for component in sorted({layer.name.split(".", 1)[0] for layer in layers}):
        # Per entry, so that wide and narrow layers compare.
        sizes = {
            layer.name: layer.norm / math.sqrt(prod(layer.shape))
            for layer in layers
            if layer.norm and layer.name.startswith(component + ".")
        }
        if sizes:
            middle = median(sizes.values())
            over = [name for name, size in sizes.items() if size > FAR_FROM_THE_REST * middle]
            under = [name for name, size in sizes.items() if size * FAR_FROM_THE_REST < middle]
            for names, word in ((over, "above"), (under, "below")):
                if names:
                    far = f"{FAR_FROM_THE_REST:g} times {word} the median layer of {component}"
                    yield f"more than {far}: {_some(names)}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _counted(values: Iterable[str]) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} layers)" for value, count in counts.most_common())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
