"""Single-file checkpoints of Stable Diffusion 1, 2 and XL: the original names, and where each of our weights lies.

The UNet has the original code's numbering of blocks. The text encoder of SD 2 and the second one of SDXL are
OpenCLIP's, which hold q, k and v in one weight.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from mmpeft.key_formats.kohya_names import RESIDUAL, original_blocks

_UNET = "model.diffusion_model."
_CLIP = {
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
_OPEN_CLIP = {
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",  # SDXL's refiner has no first encoder
    "conditioner.embedders.1.model.": "text_encoder_2",
}
# SD 2 reads the layer before the last: its loaders leave out the last one and what comes after.
_UNUSED = re.compile(r"cond_stage_model\.model\.(transformer\.resblocks\.23\.|text_projection$|logit_scale$)")
_RESIDUAL = {original: ours for ours, original in RESIDUAL.items()}
_OPEN_CLIP_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


@dataclass(frozen=True)
class Place:
    """Where a weight lies in a file.

    Args:
        key: the tensor that holds it.
        rows: (first, end) of the rows that are it, where a tensor holds several weights.
        transposed: whether the tensor is (in, out) where the weight is (out, in).
    """

    key: str
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def shape(self, tensor: tuple[int, ...]) -> tuple[int, ...]:
        """Give the weight's shape from the tensor's."""
        if self.rows is not None:
            return (self.rows[1] - self.rows[0], *tensor[1:])
        return tensor[::-1] if self.transposed else tensor


def is_ours(keys: Mapping[str, object]) -> bool:
    """Tell whether the keys are those of a single-file checkpoint of Stable Diffusion 1, 2 or XL."""
    return f"{_UNET}input_blocks.0.0.weight" in keys


def places(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Find the UNet's and text encoders' weights in a single file.

    Args:
        shapes: of the file's tensors, by key.

    Returns:
        By name on disk with the component ("unet.conv_in.weight"); the VAE and what is none of these is left out.
    """
    unet = [key.removeprefix(_UNET) for key in shapes if key.startswith(_UNET)]
    blocks = _unet_blocks(unet)
    found = {f"unet.{_unet_name(key, blocks)}": Place(_UNET + key) for key in unet}
    for key, shape in shapes.items():
        for prefix, component in _CLIP.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix).removeprefix("text_model.")
                found[f"{component}.text_model.{name}"] = Place(key)
        for prefix, component in _OPEN_CLIP.items():
            if key.startswith(prefix) and not _UNUSED.match(key):
                for name, place in _open_clip(key, key.removeprefix(prefix), shape):
                    found[f"{component}.{name}"] = place
    return found


def _unet_blocks(keys: Collection[str]) -> dict[str, str]:
    """Map the beginnings of original names to diffusers'."""
    ends = [int(key.split(".")[1]) for key in keys if key.endswith(".0.op.weight")]
    numbers = [int(key.split(".")[1]) for key in keys if key.startswith("input_blocks.")]
    # the first downsampler comes after the first level's layers, which come after the first convolution
    table = original_blocks(min(ends, default=max(numbers, default=0) + 1) - 1)
    return {original: ours for ours, originals in table.items() for original in originals}


def _unet_name(key: str, blocks: Mapping[str, str]) -> str:
    parts = key.split(".")
    for depth in range(
        min(4, len(parts) - 1), 0, -1
    ):  # the longest: an upsampler may stand where an attention could
        block, rest = blocks.get(".".join(parts[:depth])), ".".join(parts[depth:])
        if block is not None:
            inner, _, kind = rest.rpartition(".")
            inner = _RESIDUAL.get(inner, inner) if ".resnets." in block else inner
            return f"{block}.{inner}.{kind}" if inner else f"{block}.{kind}"
    return key


def _open_clip(key: str, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Place]]:
    if name in _OPEN_CLIP_ENDS:
        yield _OPEN_CLIP_ENDS[name], Place(key, transposed=name == "text_projection")
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
    if layer is None:
        return
    number, inner, kind = layer.groups()
    ours = f"text_model.encoder.layers.{number}"
    if inner == "attn.in_proj":
        width = shape[0] // 3
        for at, letter in enumerate("qkv"):
            yield f"{ours}.self_attn.{letter}_proj.{kind}", Place(key, (at * width, (at + 1) * width))
    elif inner in _OPEN_CLIP_LAYER:
        yield f"{ours}.{_OPEN_CLIP_LAYER[inner]}.{kind}", Place(key)
