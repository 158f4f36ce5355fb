"""kohya's and LyCORIS's files: "lora_unet_<layer>.lora_down.weight", a layer's dots turned into underscores.

The first part of a key names the component (`lora_unet_`, `lora_te_`, `lora_te1_`, `lora_te2_`, ...; LyCORIS's wrapper
writes `lycoris_` for all), the middle the layer (see `kohya_names`), the rest what the tensor is (see `lycoris`). Alpha
lies in the file layer by layer; without it alpha = rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from mmpeft.adapter_card import AdapterCard
from mmpeft.errors import BaseMismatch, FormatError, MethodError
from mmpeft.injection import COMPONENTS
from mmpeft.key_formats import kohya_metadata, kohya_names, lycoris
from mmpeft.key_formats.kohya_names import flattened
from mmpeft.layer_adapter import LayerAdapter, shapes_agree

Shapes = Mapping[str, tuple[int, ...]]

# The header key under which our own LyCORIS files say which layer each flattened name is.
LAYERS_KEY = "mmpeft_layers"
# kohya calls every denoiser a UNet.
_PREFIXES: dict[str, tuple[str, ...]] = {
    "lora_unet": ("unet", "transformer"),
    "oft_unet": ("unet",),
    "lora_transformer": ("transformer",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3",),
    "lycoris": COMPONENTS,
}
_WRITTEN = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
    "language_model": "lycoris",
    "vision_tower": "lycoris_vision_tower",
    "projector": "lycoris_projector",
}
_ANY_PREFIX = "|".join(sorted(_PREFIXES, reverse=True))
_KEY = re.compile(rf"({_ANY_PREFIX})_([^.]+)\.(.+)")
_KOHYA_OFT = "oft_unet_"
# diffusers' export keeps a dot in the names of DoRA's magnitudes: "lora_unet_..._attn1.to_q.lora_magnitude_vector"
_DOTTED_MAGNITUDE = re.compile(rf"((?:{_ANY_PREFIX})[._].+)\.lora_magnitude_vector(?:\.weight)?")
_FUSED_NAMES = re.compile(r"_(double_blocks|single_blocks|joint_blocks)_")
_SHOWN = 3


def is_ours(keys: Iterable[str]) -> bool:
    """Tell whether keys look like kohya's or LyCORIS's."""
    return any(_KEY.fullmatch(key) for key in keys)


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    shapes: Shapes | None = None,
    *,
    keep_unknown: bool = False,
) -> dict[str, LayerAdapter]:
    """Turn a kohya or LyCORIS file into layer adapters by layer name with the component in front.

    Args:
        tensors: the file's tensors.
        metadata: the file's header metadata.
        shapes: of the base's layers, gains and biases, by name on disk with the component in front.
        keep_unknown: whether a name that cannot be read stays as it is in the file, after its component and a dot, for
            looking at the file alone.

    Raises:
        FormatError: a key is none of kohya's or LyCORIS's, tensors do not fit each other, or a name cannot be read
            without the base.
        BaseMismatch: names that no layer of the base has, counted by component.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, part, tensor = _split(key, tensor)
        modules.setdefault(stem, {})[part] = tensor
    rslora = _is_rslora(metadata)
    layers: dict[str, LayerAdapter] = {}
    for stem, name in _names(modules, metadata, shapes, keep_unknown).items():
        shape = shapes.get(name) if shapes else None
        parts = lycoris.layer_from(
            name, modules[stem], shape, rslora=rslora, kohya_oft=stem.startswith(_KOHYA_OFT)
        )
        for ending, layer in parts.items():
            full = f"{name}.{ending}" if ending else name
            if full in layers:
                raise FormatError(f"{full} is there twice, under two names")
            layers[full] = layer
    return layers


def write(
    components: Mapping[str, Mapping[str, LayerAdapter]],
    card: AdapterCard | None = None,
    *,
    title: str = "",
    base: Shapes | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Turn layer adapters, by component and layer name, into a file's tensors and header metadata.

    UNet layers are called as kohya's scripts call them: by diffusers' names, for SDXL by those of the original code.

    Args:
        card: says which base, trigger and resolution it is.
        title: for people; A1111 calls the adapter by it.
        base: shapes of the base's layers, where it is known; they tell how an unusual UNet counts its blocks.

    Raises:
        MethodError: layers that have no form in these files, or whose names become the same.
    """
    card, layers = card or AdapterCard(), _joined(components)
    family = kohya_metadata.family_of(
        {name: tuple(layer.shape) for name, layer in layers.items()}, card, base
    )
    is_sdxl = family is kohya_metadata.SDXL
    tensors = _tensors(layers, _stems(layers, base or {}, is_sdxl, is_original=is_sdxl))
    return tensors, kohya_metadata.metadata_of(tensors, layers, card, family, title)


def write_with_names(
    components: Mapping[str, Mapping[str, LayerAdapter]],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Turn layer adapters into a LyCORIS file that says in its header which layer each name is.

    Raises:
        MethodError: layers that have no form in these files, or whose names become the same.
    """
    layers = _joined(components)
    stems = _stems(layers, {}, "text_encoder_2" in components, is_original=False)
    names = {stem: name for name, stem in stems.items()}
    return _tensors(layers, stems), {"format": "pt", LAYERS_KEY: json.dumps(names, sort_keys=True)}


def _joined(components: Mapping[str, Mapping[str, LayerAdapter]]) -> dict[str, LayerAdapter]:
    return {f"{c}.{name}": layer for c, layers in components.items() for name, layer in layers.items()}


def _tensors(layers: Mapping[str, LayerAdapter], stems: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        f"{stem}.{part}": tensor
        for name, stem in stems.items()
        for part, tensor in lycoris.parts_of(layers.get(name), layers.get(f"{name}.bias")).items()
    }


def _stems(
    layers: Mapping[str, LayerAdapter], base: Shapes, is_sdxl: bool, is_original: bool
) -> dict[str, str]:
    """Give the flattened name, prefix included, of every module: a layer and its bias are one."""
    per_block = kohya_names.layers_per_block_of(base)
    stems: dict[str, str] = {}
    for name in dict.fromkeys(full.removesuffix(".bias") for full in layers):
        component, _, rest = name.partition(".")
        if component not in _WRITTEN:
            raise MethodError(f"kohya's files have no place for {component}")
        originals = kohya_names.original_names(rest, per_block) if is_original and component == "unet" else ()
        prefix = "lora_te" if component == "text_encoder" and not is_sdxl else _WRITTEN[component]
        if getattr(layers.get(name), "freezes_at_zero", False):
            prefix = _KOHYA_OFT.removesuffix("_")  # by which readers know what alpha 0 means there
        stems[name] = f"{prefix}_{flattened(originals[0] if originals else rest)}"
    alike = [stem for stem, count in Counter(stems.values()).items() if count > 1]
    if alike:
        names = [name for name, stem in stems.items() if stem == alike[0]]
        raise MethodError(f"{' and '.join(names)} would both be called {alike[0]} in a kohya file")
    return stems


def _split(key: str, tensor: Tensor) -> tuple[str, str, Tensor]:
    """Take a key apart into (flattened name with its prefix, what the tensor is), with the tensor in that form."""
    if magnitude := _DOTTED_MAGNITUDE.fullmatch(key):
        return flattened(magnitude[1]), "dora_scale", tensor.reshape(-1, 1)
    if not _KEY.fullmatch(key):
        raise FormatError(f"{key!r} is no key of kohya's or LyCORIS's files, which the others in it are")
    stem, _, part = key.partition(".")
    return stem, part, tensor


def _is_rslora(metadata: Mapping[str, str]) -> bool:
    try:
        return json.loads(metadata.get("ss_network_args", "{}")).get("rs_lora") in (True, "True", "true", "1")
    except (ValueError, RecursionError, AttributeError):
        return False  # a remark of the training, which decides for few files


def _names(
    stems: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    shapes: Shapes | None,
    keep_unknown: bool,
) -> dict[str, str]:
    """Find the layer, with its component, that each flattened name means."""
    stated = _stated_names(metadata)
    find = _Finder(shapes)
    names: dict[str, str] = {}
    unknown: list[str] = []
    for stem in stems:
        found = (stated[stem],) if stem in stated else find(stem)
        if len(found) > 1 and shapes is not None:
            # SDXL's text encoders have the same names and other widths
            found = tuple(name for name in found if _fits(name, stems[stem], shapes)) or found
        if len(found) > 1 and not keep_unknown:
            hint = "give as base only the component that it is for" if shapes else "give the base"
            raise FormatError(f"{stem!r} can mean {' or '.join(found)}; {hint}")
        if len(found) == 1:
            names[stem] = found[0]
        elif keep_unknown:
            names[stem] = f"{_title(stem)}.{_prefix_of(stem)[1]}"
        else:
            unknown.append(stem)
    if unknown and any(_FUSED_NAMES.search(stem) for stem in unknown):
        raise FormatError(
            f"{unknown[0]!r} is a name of Flux's or Stable Diffusion 3's own code, which fuses layers and is not read"
        )
    if unknown and shapes is None:
        raise FormatError(
            f"{_counted(names, unknown)} can be read without the base; nothing tells where the dots were in "
            f"{unknown[0]!r}: give the base that it was trained on"
        )
    if unknown and shapes is not None:
        raise BaseMismatch(
            f"{_counted(names, unknown)} are layers of this base; not {_some(unknown)}: "
            f"{_reason(unknown, names, shapes)}"
        )
    return names


def _fits(name: str, parts: Mapping[str, Tensor], shapes: Shapes) -> bool:
    layer = lycoris.layer_from(name, parts, shapes[name]).get("")
    return layer is None or shapes_agree(tuple(layer.shape), shapes[name])


class _Finder:
    """Finds the layers that a flattened name can mean, in a base or by the level names that are known."""

    def __init__(self, shapes: Shapes | None) -> None:
        self._tables: dict[str, dict[str, tuple[str, ...]]] | None = None
        if shapes is not None:
            per_block = kohya_names.layers_per_block_of(shapes)
            components = {name.split(".", 1)[0] for name in shapes}
            self._tables = {c: kohya_names.lookup_table(c, shapes, per_block) for c in sorted(components)}

    def __call__(self, stem: str) -> tuple[str, ...]:
        found = [name for component, flat in self._readings(stem) for name in self._look_up(component, flat)]
        return tuple(dict.fromkeys(found))

    def _readings(self, stem: str) -> Iterator[tuple[str, str]]:
        """Give the (component, flattened name) pairs that a key's first part can stand for."""
        prefix, flat = _prefix_of(stem)
        if prefix != "lycoris":
            first, *others = _PREFIXES[prefix]
            yield first, flat
            if self._tables is not None and first not in self._tables:
                yield from ((other, flat) for other in others)
            return
        named = [component for component in COMPONENTS if flat.startswith(component + "_")]
        if named:  # "text_encoder_2_" starts with "text_encoder_" too
            longest = max(named, key=len)
            yield longest, flat.removeprefix(longest + "_")
        if self._tables is not None:
            yield from ((component, flat) for component in self._tables)
        elif guess := kohya_names.component_of(flat):
            yield guess, flat

    def _look_up(self, component: str, flat: str) -> tuple[str, ...]:
        if self._tables is not None:
            return self._tables.get(component, {}).get(flat, ())
        return tuple(f"{component}.{name}" for name in kohya_names.from_vocabulary(component, flat))


def _prefix_of(stem: str) -> tuple[str, str]:
    match = _KEY.fullmatch(stem + ".x")
    assert match is not None  # `_split` let it through
    return match[1], match[2]


def _stated_names(metadata: Mapping[str, str]) -> dict[str, str]:
    if LAYERS_KEY not in metadata:
        return {}
    try:
        names = {str(stem): str(name) for stem, name in json.loads(metadata[LAYERS_KEY]).items()}
    except (ValueError, RecursionError, AttributeError) as error:
        raise FormatError(f"the header's {LAYERS_KEY} is no JSON object") from error
    for name in names.values():
        if name.partition(".")[0] not in COMPONENTS:
            raise FormatError(f"the header's {LAYERS_KEY} has {name!r}, which names no component")
    return names


def _counted(names: Mapping[str, str], unknown: Iterable[str]) -> str:
    """Say how many names were found, by component: "unet 3 of 12, text_encoder 0 of 2 names"."""
    found = Counter(_title(stem) for stem in names)
    missed = Counter(_title(stem) for stem in unknown)
    counts = [
        f"{title} {found[title]} of {found[title] + missed[title]}" for title in sorted({*found, *missed})
    ]
    return f"{', '.join(counts)} names"


def _title(stem: str) -> str:
    prefix, _ = _prefix_of(stem)
    return prefix if prefix == "lycoris" else _PREFIXES[prefix][0]


def _some(stems: list[str]) -> str:
    shown = ", ".join(repr(stem) for stem in stems[:_SHOWN])
    return shown if len(stems) <= _SHOWN else f"{shown} and {len(stems) - _SHOWN} more"


def _reason(unknown: list[str], names: Mapping[str, str], shapes: Shapes) -> str:
    """Guess why names are not those of a base."""
    components = {name.split(".", 1)[0] for name in shapes}
    missing = {_title(stem) for stem in unknown} - components - {"lycoris"}
    if any(stem.startswith("lora_te2_") for stem in unknown) and "text_encoder_2" in missing:
        return (
            "the file is for a base with two text encoders, as SDXL has, and this one has no text_encoder_2"
        )
    if missing:
        return f"the base that was given has no {' and no '.join(sorted(missing))}"
    if not names:
        return "the file belongs to another kind of base"
    return "the file belongs to a base of another size, or adapts layers that cannot be adapted here"
