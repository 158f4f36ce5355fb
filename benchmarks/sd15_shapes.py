"""Stable Diffusion 1.5's UNet in its published configuration, its weights noise."""

import torch
from diffusers import UNet2DConditionModel


def unet_of_sd15(dtype: torch.dtype, device: str = "cpu") -> UNet2DConditionModel:
    """Make the UNet in a float type, in evaluation mode; on the device "meta" it has shapes alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return UNet2DConditionModel(
                sample_size=64,
                block_out_channels=(320, 640, 1280, 1280),
                layers_per_block=2,
                cross_attention_dim=768,
                attention_head_dim=8,
                down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
                up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
            ).eval()
    finally:
        torch.set_default_dtype(before)
