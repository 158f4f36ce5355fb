"""Our map of single-file names, judged by diffusers' own conversion of the same files."""

import pytest
import torch

from mmpeft.key_formats.kohya_names import original_names
from mmpeft.key_formats.stable_diffusion import is_ours, places

SD15 = {"cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def unet_on_meta(config):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def original_key(name, has_attention):
    layer, _, kind = name.rpartition(".")
    places = original_names(layer)
    place = places[-1] if "upsamplers" in name and not has_attention else places[0]
    return f"model.diffusion_model.{place}.{kind}"


@pytest.mark.parametrize(("config", "embedder"), [(SD15, "cond_stage_model"), (SDXL, "conditioner")])
def test_every_unet_weight_is_found_where_diffusers_finds_it(config, embedder):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = unet_on_meta(config)
    names = list(unet.state_dict())
    keys = {}
    for name in names:
        block = ".".join(name.split(".")[:2])
        keys[name] = original_key(name, any(other.startswith(f"{block}.attentions.") for other in names))
    file = {key: torch.tensor(float(number)) for number, key in enumerate(keys.values())}
    converted = convert_ldm_unet_checkpoint(dict(file), config=dict(unet.config))
    by_number = {int(number): key for key, number in file.items()}
    expected = {name: by_number[int(number)] for name, number in converted.items()}
    assert set(expected) == set(names)

    shapes = {keys[name]: tuple(weight.shape) for name, weight in unet.state_dict().items()}
    found = places({**shapes, f"{embedder}.unrelated": (1,), "first_stage_model.decoder.conv_in.bias": (8,)})
    assert is_ours(shapes)
    assert {name.removeprefix("unet."): place.key for name, place in found.items()} == expected


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("cond_stage_model.model.", "text_encoder"),
        ("conditioner.embedders.1.model.", "text_encoder_2"),
        ("conditioner.embedders.0.model.", "text_encoder_2"),
    ],
)
def test_every_open_clip_weight_is_found_where_diffusers_finds_it(prefix, component):
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width, generator = 8, torch.Generator().manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=width,
    )  # fmt: skip
    layer_shapes = {
        "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
        "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (16, width), "mlp.c_fc.bias": (16,),
        "mlp.c_proj.weight": (width, 16), "mlp.c_proj.bias": (width,),
    }  # fmt: skip
    shapes = {
        f"transformer.resblocks.{n}.{key}": shape for n in range(2) for key, shape in layer_shapes.items()
    }
    shapes |= {"token_embedding.weight": (20, width), "positional_embedding": (8, width)}
    shapes |= {"ln_final.weight": (width,), "ln_final.bias": (width,), "text_projection": (width, width)}
    file = {prefix + key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    converted = convert_open_clip_checkpoint(CLIPTextModelWithProjection(config), dict(file), prefix=prefix)
    # its rename of the final norm inside of the transformer has no match here, so each name comes once
    found = places({key: tuple(tensor.shape) for key, tensor in file.items()})
    assert {name.removeprefix(f"{component}.") for name in found} == set(converted)
    for name, weight in converted.items():
        place = found[f"{component}.{name}"]
        tensor = file[place.key]
        ours = tensor[slice(*place.rows)] if place.rows else tensor.T if place.transposed else tensor
        assert torch.equal(ours, weight), name
        assert place.shape(tuple(tensor.shape)) == tuple(weight.shape)


def test_what_loaders_leave_out_of_sd2_is_no_place():
    file = {
        "cond_stage_model.model.transformer.resblocks.22.attn.out_proj.bias": (8,),
        "cond_stage_model.model.transformer.resblocks.23.attn.out_proj.bias": (8,),
        "cond_stage_model.model.text_projection": (8, 8),
    }
    assert set(places(file)) == {"text_encoder.text_model.encoder.layers.22.self_attn.out_proj.bias"}
