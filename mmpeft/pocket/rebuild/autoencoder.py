"""Train the pocket base's autoencoder: 64 x 64 pictures to 16 x 16 latents of 4 channels."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.pocket.rebuild.augmentation import between, chance, warp
from mmpeft.pocket.rebuild.drawings import Pixels, put_on, to_tensor
from mmpeft.pocket.rebuild.training import averaged, fit
from mmpeft.randomness import generator, reseed_globals

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SCALING = 0.18215
"""Stable Diffusion 1's factor from latents to what the denoiser sees"""
CROP = 32
"""pixels of a side of the first phase's crops: the network has no attention, so that it learns from them too"""
KL_WEIGHT = 2e-4


def build_autoencoder() -> "AutoencoderKL":
    """Build the network with fresh weights; `scaling_factor` is right after `standardise_latents`."""
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        scaling_factor=SCALING,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        autoencoder.quant_conv.weight[:4] *= 3
        autoencoder.quant_conv.bias[4:] -= 6  # starts with little posterior noise, on which training stalls
    return autoencoder


def train_autoencoder(
    drawings: Pixels, *, steps: int, batch: int, seed: int, learning_rate: float = 4e-4
) -> "AutoencoderKL":
    """Train on RGBA drawings (N, 64, 64, 4) with varied colours, backgrounds and geometry; in float32, averaged.

    The first 62 % of the steps see crops of 32 pixels. The loss is absolute and squared error, absolute error
    of the gradients and of the half-size picture, and a little KL divergence.
    """
    reseed_globals(seed, "autoencoder")
    draw = generator(seed, "autoencoder")
    autoencoder = build_autoencoder().to(memory_format=torch.channels_last)
    average = averaged(autoencoder, limit=0.998)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=learning_rate, weight_decay=1e-4)
    rgba = torch.from_numpy(drawings)

    def batch_loss(progress: float) -> Tensor:
        chosen = rgba[torch.randint(0, len(rgba), (batch,), generator=draw)]
        pictures = vary(chosen.float() / 255, draw)
        if progress < 0.62:
            top, left = (4 * torch.randint(0, (64 - CROP) // 4 + 1, (2,), generator=draw)).tolist()
            pictures = pictures[:, :, top : top + CROP, left : left + CROP]
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = autoencoder.encode(pictures).latent_dist
            decoded = autoencoder.decode(posterior.sample(generator=draw)).sample
        return _loss(decoded.float(), pictures, posterior.mean.float(), posterior.logvar.float())

    fit(
        batch_loss,
        autoencoder,
        [optimizer],
        name="autoencoder",
        steps=steps,
        warmup=100,
        after_step=lambda _: average.update_parameters(autoencoder),
    )
    trained: AutoencoderKL = average.module.eval()
    standardise_latents(trained, encode(trained, drawings)[0])
    return trained


def vary(rgba: Tensor, draw: torch.Generator) -> Tensor:
    """Vary colours, background and geometry, so that styles which were never seen decode well too.

    Args:
        rgba: (B, 64, 64, 4), in [0, 1].

    Returns:
        (B, 3, 64, 64), in [-1, 1].
    """
    rgb, alpha = rgba[..., :3].clone(), rgba[..., 3:]
    for index in range(len(rgb)):
        rgb[index] = _recoloured(rgb[index], draw)
    page = torch.ones(len(rgb), 1, 1, 3)
    coloured = torch.rand(len(rgb), generator=draw) < 0.2
    page[coloured] = torch.rand(int(coloured.sum()), 1, 1, 3, generator=draw)
    pictures = (rgb * alpha + page * (1 - alpha)).permute(0, 3, 1, 2)
    if chance(draw) < 0.5:
        pictures = pictures.flip(3)
    if chance(draw) < 0.35:
        pictures = warp(pictures, draw, shrink=(0.55, 1.25), turn=0.5, shift=0.25)
    return pictures * 2 - 1


def _recoloured(rgb: Tensor, draw: torch.Generator) -> Tensor:
    choice = chance(draw)
    if choice < 0.25:
        return rgb[..., torch.randperm(3, generator=draw)]
    if choice < 0.32:
        return 1 - rgb
    if choice < 0.40:
        return rgb.mean(-1, keepdim=True).expand_as(rgb)
    if choice < 0.50:
        gain, offset = between(0.5, 1.3, (1,), draw), between(-0.1, 0.15, (1,), draw)
        return (rgb * gain + offset).clamp(0, 1)
    if choice < 0.56:  # soft shading across the picture, as 3D styles have
        down, right = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
        angle = 2 * math.pi * chance(draw)
        light = 0.75 + 0.35 * (math.cos(angle) * right + math.sin(angle) * down)
        return (rgb * light[..., None]).clamp(0, 1)
    return rgb


def _loss(decoded: Tensor, pictures: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    absolute = (decoded - pictures).abs().mean()
    squared = (decoded - pictures).pow(2).mean()
    edges = (decoded.diff(dim=2) - pictures.diff(dim=2)).abs().mean()
    edges = edges + (decoded.diff(dim=3) - pictures.diff(dim=3)).abs().mean()
    coarse = (F.avg_pool2d(decoded, 2) - F.avg_pool2d(pictures, 2)).abs().mean()
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return absolute + squared + 0.5 * edges + 0.5 * coarse + KL_WEIGHT * divergence


@torch.no_grad()
def encode(autoencoder: "AutoencoderKL", drawings: Pixels) -> tuple[Tensor, Tensor]:
    """Encode drawings as they are on a white page.

    Args:
        drawings: (N, 64, 64, 4) RGBA, or (N, 64, 64, 3) RGB.

    Returns:
        Posterior means and standard deviations, each (N, 4, 16, 16), float32, not yet scaled.
    """
    means, deviations = [], []
    for start in range(0, len(drawings), 64):
        some = drawings[start : start + 64]
        pictures = to_tensor(put_on(some) if some.shape[-1] == 4 else some)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = autoencoder.encode(pictures.to(memory_format=torch.channels_last)).latent_dist
        means.append(posterior.mean.float().contiguous())
        deviations.append(posterior.std.float().contiguous())
    return torch.cat(means), torch.cat(deviations)


@torch.no_grad()
def standardise_latents(autoencoder: "AutoencoderKL", latents: Tensor) -> None:
    """Fold the latents' mean and deviation into the convolutions around them.

    Afterwards latents * 0.18215 have mean 0 and deviation 1 in each channel, and pictures decode as before.

    Args:
        latents: posterior means of typical pictures, (N, 4, h, w).
    """
    mean = latents.mean((0, 2, 3))
    gain = 1 / (latents.std((0, 2, 3)) * SCALING)
    inward, outward = autoencoder.quant_conv, autoencoder.post_quant_conv
    inward.weight[:4] *= gain[:, None, None, None]
    inward.bias[:4] = (inward.bias[:4] - mean) * gain
    inward.bias[4:] += 2 * gain.log()
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight /= gain[None, :, None, None]
