"""A base as it lies on disk: which file holds which weight, without opening the model.

Takes a diffusers folder, the folder of one component or of a transformers model (whole or in shards), a single-file
checkpoint of Stable Diffusion, or the name of a hub base that is in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmpeft.backbones.pocket import pocket_folder
from mmpeft.disk.json_files import read_object
from mmpeft.disk.weights_stream import WeightsFile
from mmpeft.errors import BaseError
from mmpeft.injection import COMPONENTS
from mmpeft.key_formats import stable_diffusion
from mmpeft.key_formats.stable_diffusion import Place
from mmpeft.plugins import near_miss

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True)
class Slot:
    """Where a weight of a base lies: a tensor of one of its files, or a part of it."""

    file: WeightsFile
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.place.shape(self.file.entries[self.place.key].shape)

    @property
    def dtype(self) -> str:
        """The type in the file, in safetensors' words."""
        return self.file.entries[self.place.key].dtype

    def within(self, tensor: Tensor) -> Tensor:
        """Give the weight as a view of the tensor that holds it."""
        part = tensor if self.place.rows is None else tensor[slice(*self.place.rows)]
        return part.T if self.place.transposed else part

    def read(self) -> Tensor:
        """Read the weight, in the file's type."""
        return self.within(self.file.read(self.place.key))


@dataclass(frozen=True)
class BaseFiles:
    """A base on disk.

    Args:
        path: the folder or the file.
        title: how it is called, without a path.
        prediction: what the denoiser predicts; "" where that is not known.
        weights: where each weight lies, by name on disk with the component ("unet.conv_in.weight"): several slots
            where a folder holds the model in several types.
        tied: output layer's weight -> the embedding's that it shares.
        quantised: component -> the way in which its weights are quantised.
        folders: component -> where it lies; empty for a single file.
    """

    path: Path
    title: str
    prediction: str
    weights: Mapping[str, tuple[Slot, ...]]
    tied: Mapping[str, str]
    quantised: Mapping[str, str]
    folders: Mapping[str, Path]

    @property
    def is_file(self) -> bool:
        """Whether it is one file with all components."""
        return self.path.is_file()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what adapters name: layers by their weight, and biases."""
        return {name.removesuffix(".weight"): slots[0].shape for name, slots in self.weights.items()}

    def slots(self, layer: str) -> tuple[Slot, ...]:
        """Give where the weight lies that an adapter's layer changes; empty if it is not there."""
        return self.weights.get(self.weight_of(layer) or "", ())

    def weight_of(self, layer: str) -> str | None:
        """Give the name of the weight that an adapter's layer changes; None if it is not there.

        A layer is named without ".weight"; language models are found with and without the level "model.", which a
        model has on disk by which class it was saved from.
        """
        component, _, rest = layer.partition(".")
        names = (
            [rest] if component != "language_model" else [rest, f"model.{rest}", rest.removeprefix("model.")]
        )
        for name in names:
            for weight in (f"{component}.{name}.weight", f"{component}.{name}"):
                if weight in self.weights:
                    return weight
                if weight in self.tied:
                    return self.tied[weight]
        return None


def open_base(base: str | Path) -> BaseFiles:
    """Find a base's files and read their headers.

    Raises:
        BaseError: there is nothing, or nothing that holds weights in safetensors files.
    """
    name = str(base)
    path = pocket_folder() if name == "pocket" else Path(name).expanduser()
    if path.is_file():
        return _single_file(path)
    if not path.exists() and len(Path(name).parts) <= 2 and not name.startswith((".", "/", "~")):
        return _folder(_cached(name), name)
    if not path.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = near_miss(path.name, siblings) if siblings else ""
        raise BaseError(f"there is no base {name}{hint if 'did you mean' in hint else ''}")
    return _folder(path, "pocket" if name == "pocket" else path.resolve().name)


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise BaseError(
            f"there is no folder {name} here, and no base of this name in the hub's cache; give a folder or a file on "
            f"this machine, or pocket"
        ) from error


def _single_file(path: Path) -> BaseFiles:
    if path.suffix != ".safetensors":
        raise BaseError(f"{path.name} is no .safetensors file, the only format that is read")
    file = WeightsFile.open(path)
    if not stable_diffusion.is_ours(file.entries):
        raise BaseError(
            f"{path.name} is no single-file checkpoint of Stable Diffusion 1, 2 or XL (its first key is "
            f"{next(iter(file.entries), 'missing')!r}); give the model's folder"
        )
    places = stable_diffusion.places({key: entry.shape for key, entry in file.entries.items()})
    weights = {name: (Slot(file, place),) for name, place in places.items()}
    return BaseFiles(path, path.stem, "", weights, {}, {}, {})


def _folder(folder: Path, title: str) -> BaseFiles:
    components = dict(_components(folder))
    if not components:
        raise BaseError(
            f"{folder} is no model folder: it has neither model_index.json nor config.json with weights that can carry "
            f"adapters"
        )
    weights: dict[str, tuple[Slot, ...]] = {}
    tied: dict[str, str] = {}
    quantised: dict[str, str] = {}
    for component, place in components.items():
        config = _json(place / "config.json")
        if quantisation := config.get("quantization_config"):
            quantised[component] = str(quantisation.get("quant_method", "an unknown method"))
        for slot in _slots(place):
            name = f"{component}.{_disk_name(slot.place.key, component, config)}"
            weights[name] = (*weights.get(name, ()), slot)
        tied |= _tie(component, config, weights)
    scheduler = _json(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "")
    prediction = "v" if scheduler == "v_prediction" else str(scheduler)
    return BaseFiles(folder, title, prediction, weights, tied, quantised, components)


def _components(folder: Path) -> Iterator[tuple[str, Path]]:
    index = _json(folder / "model_index.json")
    for component in COMPONENTS:
        if component in index and (folder / component).is_dir():
            yield component, folder / component
    config = _json(folder / "config.json")
    if not index and config:
        kind = config.get("_class_name", "")
        is_clip = config.get("model_type") == "clip_text_model"
        component = "text_encoder" if is_clip else "language_model" if not kind else "transformer"
        yield "unet" if "UNet" in kind else component, folder


def _slots(folder: Path) -> Iterator[Slot]:
    files = {path.name: WeightsFile.open(path) for path in sorted(folder.glob("*.safetensors"))}
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        missing = sorted(set(_json(index).get("weight_map", {}).values()) - files.keys())
        if missing:
            raise BaseError(
                f"{folder.name} is not whole: {index.name} names {missing[0]}, which is not there"
            )
    for file in files.values():
        for key in file.entries:
            yield Slot(file, Place(key))


def _disk_name(key: str, component: str, config: Mapping[str, Any]) -> str:
    # transformers 5 may save CLIP without the level that its files had before
    is_clip = config.get("model_type") == "clip_text_model" and component.startswith("text_encoder")
    is_complete = not is_clip or key.startswith(("text_model.", "text_projection."))
    return key if is_complete else f"text_model.{key}"


def _tie(component: str, config: Mapping[str, Any], weights: dict[str, tuple[Slot, ...]]) -> dict[str, str]:
    """Give the output layer that has no weight of its own, with the embedding that stands for it.

    Where files hold both of a tied pair, each name gets the slots of both.
    """
    head = f"{component}.lm_head.weight"
    embeddings = [n for n in weights if n.startswith(f"{component}.") and n.endswith(_EMBEDDINGS)]
    if component != "language_model" or len(embeddings) != 1:
        return {}
    if head not in weights:
        return {head: embeddings[0]}
    if config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings")):
        weights[head] = weights[embeddings[0]] = (*weights[embeddings[0]], *weights[head])
        return {head: embeddings[0]}
    return {}


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    return read_object(file, BaseError)
