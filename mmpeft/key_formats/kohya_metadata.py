"""What kohya's files say about themselves in the header, by which A1111 and ComfyUI sort and filter.

`ss_*` are kohya's own, of which those that its scripts always write are written; `modelspec.*` follow Stability AI's
ModelSpec 1.0.1; `sshs_*` are hashes by which the web interfaces know a file again. Nothing about the data, and no path
or date of the training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmpeft.adapter_card import AdapterCard
from mmpeft.disk.safetensors_file import serialise
from mmpeft.layer_adapter import LayerAdapter

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """One kind of base, as these headers name it.

    Args:
        version: ss_base_model_version.
        architecture, implementation, resolution: of ModelSpec.
    """

    version: str
    architecture: str
    implementation: str
    resolution: str


SD1 = Family("sd_v1", "stable-diffusion-v1", "diffusers", "512x512")
SD2 = Family("sd_v2", "stable-diffusion-v2-512", "diffusers", "512x512")
SD2_V = Family("sd_v2", "stable-diffusion-v2-768-v", "diffusers", "768x768")
SDXL = Family(
    "sdxl_base_v1-0",
    "stable-diffusion-xl-v1-base",
    "https://github.com/Stability-AI/generative-models",
    "1024x1024",
)
# Width of the text embeddings that a UNet's cross-attention sees, and of CLIP's layers, by family.
_CROSS_WIDTHS = {768: SD1, 1024: SD2, 2048: SDXL}
_TEXT_WIDTHS = {768: SD1, 1024: SD2}


def family_of(layers: Shapes, card: AdapterCard, base: Shapes | None = None) -> Family | None:
    """Judge which kind of Stable Diffusion an adapter is for; None for other models.

    Args:
        layers: shapes of what the adapter changes, by name with the component in front.
        base: shapes of the base's layers, where it is known.
    """
    sketches = (card.fingerprint or {}).get("layers", {})
    known: dict[str, tuple[int, ...]] = {name: tuple(sketch[0]) for name, sketch in sketches.items()}
    known |= {**layers, **(base or {})}
    components = {name.split(".", 1)[0] for name in known}
    if not components <= {"unet", "text_encoder", "text_encoder_2"}:
        return None
    if "text_encoder_2" in components or any(name.startswith("unet.add_embedding.") for name in known):
        return SDXL
    widths = [
        _CROSS_WIDTHS.get(shape[1]) for name, shape in known.items() if re.search(r"\.attn2\.to_[kv]$", name)
    ]
    widths += [
        _TEXT_WIDTHS.get(shape[1]) for name, shape in known.items() if name.endswith((".q_proj", ".fc1"))
    ]
    found = next((family for family in widths if family), None)
    if found is None:
        found = SDXL if re.search(r"xl\b|sdxl", card.base, re.IGNORECASE) else SD1
    return SD2_V if found is SD2 and _prediction(card) == "v" else found


def metadata_of(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, LayerAdapter],
    card: AdapterCard,
    family: Family | None,
    title: str = "",
) -> dict[str, str]:
    """State what a kohya file's header says.

    Args:
        tensors: the file's, hashed.
        layers: the adapter's.
        family: the kind of base; None says nothing of it.
        title: for people; by it A1111 also calls the adapter.
    """
    is_lora = all(layer.method == "lora" for layer in layers.values())
    arguments = _network_args(layers, is_lora)
    facts: dict[str, str | None] = {
        "ss_network_module": "networks.lora" if is_lora else "lycoris.kohya",
        "ss_network_dim": _uniform(getattr(layer, "rank", None) for layer in layers.values()),
        "ss_network_alpha": _uniform(getattr(layer, "alpha", None) for layer in layers.values()),
        "ss_network_args": json.dumps(arguments, sort_keys=True) if arguments else None,
        "ss_output_name": title or None,
    }
    if family:
        facts |= {"ss_base_model_version": family.version, "ss_v2": str(family.version == SD2.version)}
    metadata = {key: value for key, value in facts.items() if value}
    model_hash, legacy_hash = hashes(tensors, metadata)
    metadata |= {"sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}
    if family:
        metadata |= _model_spec(card, family, title or "LoRA", model_hash)
    return metadata


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Give kohya's two hashes: SHA-256 of all after the header, and 8 digits of that of 64 KiB one MiB into the file.

    Args:
        tensors: the file's.
        metadata: of the header, only ss_* count, since people edit the others.
    """
    data = serialise(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    body = data[8 + int.from_bytes(data[:8], "little") :]
    return hashlib.sha256(body).hexdigest(), hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def _model_spec(card: AdapterCard, family: Family, title: str, model_hash: str) -> dict[str, str]:
    from mmpeft import __version__

    data = card.recipe.get("data")
    resolution = data.get("resolution") if isinstance(data, Mapping) else None
    facts = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family.architecture}/lora",
        "implementation": family.implementation,
        "implementation_version": f"mmpeft/{__version__}",
        "title": title,
        "resolution": f"{resolution}x{resolution}" if resolution else family.resolution,
        "prediction_type": _prediction(card),
        "trigger_phrase": card.trigger,
        "hash_sha256": f"0x{model_hash}",
    }
    return {f"modelspec.{key}": value for key, value in facts.items() if value}


def _network_args(layers: Mapping[str, LayerAdapter], is_lora: bool) -> dict[str, str]:
    """State ranks of 3x3 convolutions as kohya does, and the algorithm as LyCORIS does."""
    convolutions = [layer for layer in layers.values() if len(layer.shape) == 4 and layer.shape[2:] != (1, 1)]
    facts: dict[str, str | None] = {
        "conv_dim": _uniform(getattr(layer, "rank", None) for layer in convolutions),
        "conv_alpha": _uniform(getattr(layer, "alpha", None) for layer in convolutions),
    }
    if not is_lora:
        methods = {layer.method for layer in layers.values()} - {"full"} or {"full"}
        facts["algo"] = "+".join(
            sorted({"lora": "locon", "dora": "locon"}.get(name, name) for name in methods)
        )
        facts["dora_wd"] = "True" if "dora" in methods else None
    return {key: value for key, value in facts.items() if value}


def _uniform(values: Iterable[Any]) -> str | None:
    """Word what all layers share; "Dynamic", as kohya's resizing says it, where they differ."""
    known = {float(value) for value in values if value is not None}
    if not known:
        return None
    return f"{known.pop():g}" if len(known) == 1 else "Dynamic"


def _prediction(card: AdapterCard) -> str:
    return str((card.fingerprint or {}).get("prediction") or "")
