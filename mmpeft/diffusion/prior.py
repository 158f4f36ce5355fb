"""The frozen base as its own prior: what it says while it draws pictures that nobody asked the adapter for.

Prior preservation (Ruiz et al. 2022, "DreamBooth", arXiv:2208.12242, section 3.2) trains on pictures that the base
drew. Here every step of the drawing is kept, the noisy latents with the base's own prediction for them: an adapter that
gives the same predictions leaves those drawings as they are. The targets carry no noise of their own, so
fewer samples do, and they cost nothing beyond the drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.backbones.base import ImageBackbone
from mmpeft.data.tensor_cache import TensorCache, content_key
from mmpeft.diffusion.noise_schedule import NoiseSchedule
from mmpeft.randomness import normal

# Prompts drawn at once, and kept under one cache entry: the split must not change with the number of processes.
_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class Prior:
    """The base's drawings, step by step.

    Args:
        noisy: (N, C, h, w), float32, what the denoiser was given.
        timesteps: (N,), int64.
        prediction: (N, C, h, w), float32, what the frozen base said.
        prompts: of each sample its prompt, "" for the unconditional half.
        latents: (P, C, h, w), float32, the finished drawings, one a prompt, in the denoiser's scale.
        drawn: the P prompts.
    """

    noisy: Tensor
    timesteps: Tensor
    prediction: Tensor
    prompts: tuple[str, ...]
    latents: Tensor
    drawn: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.timesteps)


@torch.no_grad()
def draw_prior(
    backbone: ImageBackbone,
    prompts: Sequence[str],
    cache: TensorCache,
    *,
    seed: int,
    steps: int = 20,
    guidance: float = 4.0,
    process: int = 0,
    processes: int = 1,
) -> Prior:
    """Let the base draw prompts at its own resolution, and keep each step; what was drawn before comes from the cache.

    Deterministic DDIM (Song et al. 2020, arXiv:2010.02502, eq. 12 with eta 0) with classifier-free guidance; timesteps
    are trailing (Lin et al. 2023, arXiv:2305.08891, table 2).

    Args:
        backbone: without an adapter, or with one that is switched off.
        prompts: without the trigger; at least one.
        cache: where drawings are kept, by base, prompt, seed and settings.
        seed: of the first noise.
        steps: denoising steps of a drawing.
        guidance: scale of classifier-free guidance.
        process: of several processes, which starts with its own share, so that together they draw everything once.
        processes: how many share the cache.
    """
    groups = [tuple(prompts[start : start + _AT_ONCE]) for start in range(0, len(prompts), _AT_ONCE)]

    def drawing(group: tuple[str, ...]) -> dict[str, Tensor]:
        key = content_key(
            "prior", backbone.denoiser_fingerprint, backbone.text_fingerprint, group, seed, steps, guidance
        )
        return cache.get(key, lambda: _draw(backbone, group, seed=seed, steps=steps, guidance=guidance))

    for group in groups[process::processes]:
        drawing(group)
    parts = [drawing(group) for group in groups]
    return Prior(
        noisy=torch.cat([part["noisy"].flatten(0, 1) for part in parts]),
        timesteps=torch.cat([part["timesteps"].repeat_interleave(part["noisy"].shape[1]) for part in parts]),
        prediction=torch.cat([part["prediction"].flatten(0, 1) for part in parts]),
        prompts=tuple(
            prompt
            for group, part in zip(groups, parts, strict=True)
            for _ in range(len(part["timesteps"]))
            for prompt in (*group, *[""] * len(group))
        ),
        latents=torch.cat([part["latents"] for part in parts]),
        drawn=tuple(prompts),
    )


def _draw(
    backbone: ImageBackbone, prompts: Sequence[str], *, seed: int, steps: int, guidance: float
) -> dict[str, Tensor]:
    schedule, count = backbone.noise_schedule, len(prompts)
    texts = backbone.encode_text([*prompts, ""])
    # conditional and unconditional go through the denoiser together
    place = torch.tensor([*range(count), *[count] * count])
    conditioning = {name: tensor[place.to(tensor.device)] for name, tensor in texts.items()}
    shape = backbone.latent_shape
    latents = torch.stack([normal(shape, seed, "prior", prompt) for prompt in prompts]).to(backbone.device)
    kept: dict[str, list[Tensor]] = {"noisy": [], "prediction": []}
    timesteps = trailing_timesteps(schedule.timesteps, steps)
    for timestep, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
        noisy = torch.cat([latents, latents])
        prediction = backbone.predict(
            noisy, torch.full((2 * count,), timestep, device=backbone.device), conditioning
        )
        kept["noisy"].append(noisy)
        kept["prediction"].append(prediction)
        asked, unasked = prediction.chunk(2)
        latents = ddim_step(schedule, unasked + guidance * (asked - unasked), latents, timestep, following)
    return {
        **{name: torch.stack(tensors) for name, tensors in kept.items()},
        "timesteps": torch.tensor(timesteps),
        "latents": latents,
    }


def trailing_timesteps(count: int, steps: int) -> list[int]:
    """Spread `steps` timesteps from the noisiest of `count` down, the noisiest included."""
    return [round(count - place * count / steps) - 1 for place in range(steps)]


def ddim_step(
    schedule: NoiseSchedule, prediction: Tensor, noisy: Tensor, timestep: int, following: int
) -> Tensor:
    """Go from one timestep to a less noisy one along the prediction.

    Args:
        prediction: (B, C, h, w), as `schedule.prediction` says.
        noisy: (B, C, h, w), at `timestep`.
        timestep: 0..999.
        following: the next timestep; -1 for the finished latents.

    Returns:
        (B, C, h, w), at `following`.
    """
    here = torch.full((len(noisy),), timestep, device=noisy.device)
    clean = schedule.x0_of(prediction, noisy, here)
    if following < 0:
        return clean
    noise = schedule.noise_of(prediction, noisy, here)
    return schedule.add_noise(clean, noise, torch.full_like(here, following))
