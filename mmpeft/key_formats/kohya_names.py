"""The names in kohya's files: a layer's name with its dots turned into underscores, which also are inside of names.

So "down_blocks_0_attentions_0" cannot be undone by itself. Given a base, every layer's name is flattened and looked up.
Without one, names are put together from the level names of diffusers' and transformers' models, and what could be read
in two ways is not guessed at. SDXL files name UNet layers as the original code did ("input_blocks_4_1_proj_in"); the
table of blocks below says both ways which layer that is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

_UNET_LEVELS = """
    add_embedding add_k_proj add_v_proj attentions attn1 attn2 class_embedding conv conv1 conv2 conv_in conv_norm_out
    conv_out conv_shortcut down_blocks downsamplers ff linear_1 linear_2 mid_block net norm norm1 norm2 norm3
    proj proj_in proj_out resnets time_emb_proj time_embedding to_k to_out to_q to_v transformer_blocks up_blocks
    upsamplers
"""
_TEXT_LEVELS = """
    embeddings encoder fc1 fc2 final_layer_norm k_proj layer_norm1 layer_norm2 layers mlp out_proj position_embedding
    q_proj self_attn text_model text_projection token_embedding v_proj
    DenseReluDense SelfAttention block k layer layer_norm o q shared v wi_0 wi_1 wo
"""
_TRANSFORMER_LEVELS = """
    add_k_proj add_q_proj add_v_proj attn attn1 attn2 context_embedder ff ff_context guidance_embedder
    linear_1 linear_2 net norm1 norm1_context norm2 norm2_context norm_added_k norm_added_q norm_k norm_out norm_q
    pos_embed proj proj_mlp proj_out single_transformer_blocks text_embedder time_text_embed timestep_embedder
    to_add_out to_k to_out to_q to_v transformer_blocks x_embedder
"""
_LEVELS = {
    "unet": frozenset(_UNET_LEVELS.split()),
    "transformer": frozenset(_TRANSFORMER_LEVELS.split()),
    "text_encoder": frozenset(_TEXT_LEVELS.split()),
    "text_encoder_2": frozenset(_TEXT_LEVELS.split()),
    "text_encoder_3": frozenset(_TEXT_LEVELS.split()),
}
# What a file without a component in its names is, by the first level of a name.
_FIRST_LEVELS = {
    "down_blocks": "unet",
    "mid_block": "unet",
    "up_blocks": "unet",
    "conv_in": "unet",
    "conv_norm_out": "unet",
    "conv_out": "unet",
    "time_embedding": "unet",
    "add_embedding": "unet",
    "text_model": "text_encoder",
    "encoder": "text_encoder",
    "embeddings": "text_encoder",
    "final_layer_norm": "text_encoder",
    "text_projection": "text_encoder",
    "transformer_blocks": "transformer",
    "single_transformer_blocks": "transformer",
    "context_embedder": "transformer",
    "time_text_embed": "transformer",
    "x_embedder": "transformer",
}
# diffusers' UNet <-> the original code's, outside of the blocks and within a residual block.
_STEM = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MOST_BLOCKS = 8
_LONGEST_NAME = 250  # letters; three times that of any layer's, and a bound for what a hostile file can cost
LAYERS_PER_BLOCK = 2
"""of every released Stable Diffusion"""


def flattened(name: str) -> str:
    """Turn a name's dots into underscores."""
    return name.replace(".", "_")


def lookup_table(
    component: str, shapes: Mapping[str, tuple[int, ...]], layers_per_block: int
) -> dict[str, tuple[str, ...]]:
    """Map every flattened name that a file may have for a component's layers to the layers that it can mean.

    Args:
        shapes: of the base, by name on disk with the component in front.
        layers_per_block: of the base's UNet.

    Returns:
        Flattened name -> names on disk with the component in front; more than one where underscores make them alike.
    """
    table: dict[str, tuple[str, ...]] = {}
    prefix = component + "."
    for full in shapes:
        if not full.startswith(prefix) or full.endswith(".bias"):
            continue
        name = full.removeprefix(prefix)
        # transformers 5 has no `text_model.` level in its live tree, from which some tools take names
        spellings = {name, name.removeprefix("text_model.")}
        if component == "unet":
            spellings |= set(original_names(name, layers_per_block))
        for spelling in spellings:
            table[flattened(spelling)] = (*table.get(flattened(spelling), ()), full)
    return table


def from_vocabulary(component: str, flat: str, layers_per_block: int = LAYERS_PER_BLOCK) -> tuple[str, ...]:
    """Put a flattened name together from known level names.

    Returns:
        The names on disk, without the component, that it can mean: none if a level is unknown.
    """
    if len(flat) > _LONGEST_NAME:
        return ()
    levels = _LEVELS.get(component, frozenset())
    found = _diffusers_prefix(flat, layers_per_block) if component == "unet" else None
    if found is None:
        names = list(_segmentations(flat, levels))
    elif not found[1]:
        names = [found[0]]
    elif ".resnets." in found[0]:
        names = [
            f"{found[0]}.{ours}" for ours, original in RESIDUAL.items() if flattened(original) == found[1]
        ]
    else:
        names = [f"{found[0]}.{name}" for name in _segmentations(found[1], levels)]
    if component.startswith("text_encoder"):
        names = [
            f"text_model.{name}" if name.startswith(("encoder.layers.", "final_")) else name for name in names
        ]
    return tuple(names)


def component_of(flat: str) -> str | None:
    """Guess the component of a flattened name by its first level; None if that is unknown."""
    matches = (c for level, c in _FIRST_LEVELS.items() if flat == level or flat.startswith(level + "_"))
    return next(matches, None)


def original_names(name: str, layers_per_block: int = LAYERS_PER_BLOCK) -> tuple[str, ...]:
    """Give the names that the original Stable Diffusion code has for a layer of diffusers' UNet.

    Returns:
        None, one, or for an upsampler two: its place depends on whether its block has attention; the first is with.
    """
    blocks, parts = original_blocks(layers_per_block), name.split(".")
    for end in range(len(parts), 0, -1):
        prefix, rest = ".".join(parts[:end]), ".".join(parts[end:])
        if prefix not in blocks:
            continue
        inner = RESIDUAL.get(rest) if ".resnets." in prefix else rest
        if inner is None:
            return ()
        return tuple(f"{original}.{inner}" if inner else original for original in blocks[prefix])
    return ()


def layers_per_block_of(names: Mapping[str, object]) -> int:
    """Count the residual blocks in a base's first down block, by names on disk with the component in front."""
    prefix = "unet.down_blocks.0.resnets."
    numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in names if name.startswith(prefix)}
    return len(numbers) or LAYERS_PER_BLOCK


def _diffusers_prefix(flat: str, layers_per_block: int) -> tuple[str, str] | None:
    """Find which block of diffusers' a flattened original name starts with, and what is left of the name."""
    blocks, parts = _flat_blocks(layers_per_block), flat.split("_")
    # longest first: "output_blocks_2_1_conv" is an upsampler, and not a part of the attention "output_blocks_2_1"
    for end in range(len(parts), 0, -1):
        if prefix := blocks.get("_".join(parts[:end])):
            return prefix, "_".join(parts[end:])
    return None


@cache
def _flat_blocks(layers_per_block: int) -> dict[str, str]:
    blocks = original_blocks(layers_per_block)
    return {flattened(original): prefix for prefix, originals in blocks.items() for original in originals}


@cache
def original_blocks(layers_per_block: int) -> dict[str, tuple[str, ...]]:
    """Tabulate which block of the original code is which of diffusers'.

    The original counts all that lies between two joints of the U: input block 0 is the first convolution, and each down
    block takes `layers_per_block` numbers and one more for its downsampler; each up block takes one layer more.
    """
    table: dict[str, tuple[str, ...]] = {name: (original,) for name, original in _STEM.items()}
    for block in range(_MOST_BLOCKS):
        first = block * (layers_per_block + 1)
        for layer in range(layers_per_block + 1):
            down, up = f"input_blocks.{first + layer + 1}", f"output_blocks.{first + layer}"
            if layer < layers_per_block:
                table[f"down_blocks.{block}.resnets.{layer}"] = (f"{down}.0",)
                table[f"down_blocks.{block}.attentions.{layer}"] = (f"{down}.1",)
            else:
                table[f"down_blocks.{block}.downsamplers.0.conv"] = (f"{down}.0.op",)
                table[f"up_blocks.{block}.upsamplers.0.conv"] = (f"{up}.2.conv", f"{up}.1.conv")
            table[f"up_blocks.{block}.resnets.{layer}"] = (f"{up}.0",)
            table[f"up_blocks.{block}.attentions.{layer}"] = (f"{up}.1",)
    return table


def _segmentations(flat: str, levels: frozenset[str]) -> Iterator[str]:
    """Give every way to read a flattened name as known levels and numbers, with dots between."""
    head, *tail = flat.split("_")
    for end in range(len(tail) + 1):
        level = "_".join([head, *tail[:end]])
        if level in levels or (end == 0 and level.isdecimal()):
            rest = tail[end:]
            if not rest:
                yield level
            else:
                yield from (f"{level}.{more}" for more in _segmentations("_".join(rest), levels))
