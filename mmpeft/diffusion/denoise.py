"""The objective of text-to-image training: say what noise was put on a latent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmpeft.backbones.base import ImageBackbone
from mmpeft.config import PluginSettings, Settings
from mmpeft.diffusion.loss_weighting import (
    debiased_weight,
    huber_error,
    min_snr_weight,
    snr_plus_one_weight,
    squared_error,
)
from mmpeft.diffusion.noise_schedule import NoiseSchedule
from mmpeft.errors import ConfigError
from mmpeft.randomness import normal, permutation, uniform


class PriorSettings(Settings):
    """The frozen base as its own prior: what was not asked for stays as the base draws it."""

    pictures: int = Field(0, ge=0)
    """drawings of the base that are kept as they are; 0 preserves nothing"""
    prompts: tuple[str, ...] = ()
    """what it draws, without the trigger, in turn with the captions of the folder"""
    share: float = Field(0.25, gt=0, le=1)
    """steps of these drawings that go into an optimiser step, for each sample of it"""
    weight: float = Field(1.0, gt=0)
    """how much all of them count against all the samples"""
    restyled: int = Field(0, ge=0)
    """visits per epoch of each drawing in the colours of the folder, with the trigger: teaches the style on what the
    folder does not show, and keeps the base's shapes; for styles that are about colour and contrast"""
    restyled_timesteps: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (0, 999)
    """first and last timestep at which those are taught"""


class DenoiseSettings(PluginSettings):
    """How the denoiser is taught."""

    name: Literal["denoise"] = "denoise"
    loss: Literal["mse", "huber"] = "mse"
    """huber lets wild pixels count less"""
    huber_delta: float = Field(0.1, gt=0)
    """error at which huber turns from square to straight; the target's deviation is 1"""
    weighting: Literal["none", "min_snr", "debiased", "snr_plus_one"] = "none"
    """how much each timestep counts; snr_plus_one is min_snr that keeps full weight at high noise, where shapes
    are decided"""
    gamma: float = Field(5.0, gt=0)
    """clip of min_snr and snr_plus_one"""
    noise_offset: float = Field(0.0, ge=0)
    """deviation of a constant added to each channel's noise, for very bright and very dark pictures; 0.1 is usual"""
    timesteps: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (0, 999)
    """first and last timestep that are taught; high ones decide shapes, low ones decide style"""
    noisy_share: float = Field(0.5, gt=0, lt=1)
    """share of the timesteps that is drawn from the noisier half of that range"""
    prior: PriorSettings = PriorSettings()
    validation_timesteps: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (100, 300, 500, 700, 900), min_length=1
    )
    """where the validation loss is taken"""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.timesteps[0] > self.timesteps[1]:
            raise ValueError(f"timesteps must be first and last, in this order; got {self.timesteps}")
        return self


@dataclass(frozen=True, eq=False)
class PriorBatch:
    """Steps of the frozen base's drawings, with what it said there.

    Args:
        noisy: (P, C, h, w), float32.
        timesteps: (P,), int64.
        prediction: (P, C, h, w), float32.
        conditioning: batch first.
    """

    noisy: Tensor
    timesteps: Tensor
    prediction: Tensor
    conditioning: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Samples that go through the model at once: all of an optimiser step, or a share of it.

    Args:
        mean: (B, C, h, w), float32, on the CPU, the VAE's posterior in the denoiser's scale.
        log_variance: (B, C, h, w), float32, on the CPU.
        conditioning: what `ImageBackbone.encode_text` gives, batch first.
        positions: each sample's place in the whole optimiser step (in validation: in the whole set).
        step_size: samples of the whole optimiser step, over accumulation and processes.
        ranges: of each sample the first and last timestep that it is taught at, None where the settings say it; without
            any, the settings say it for all.
        prior: what goes through the model beside the samples, to stay as it is.
    """

    mean: Tensor
    log_variance: Tensor
    conditioning: Mapping[str, Tensor]
    positions: tuple[int, ...]
    step_size: int
    ranges: tuple[tuple[int, int] | None, ...] | None = None
    prior: PriorBatch | None = None


class Denoise:
    """The mean error of the denoiser's prediction (Ho et al. 2020, arXiv:2006.11239, eq. 14, for epsilon).

    Every draw is a function of (seed, step, position), so splitting a step over micro-batches or processes
    changes no draw.
    """

    settings_type: ClassVar[type[DenoiseSettings]] = DenoiseSettings

    def __init__(self, settings: DenoiseSettings) -> None:
        self.settings = settings

    def loss(self, backbone: ImageBackbone, batch: ImageBatch, *, seed: int, step: int) -> tuple[Tensor, int]:
        """Give the sum of the samples' losses, a scalar with gradients, and how many samples they are.

        Raises:
            ConfigError: a setting does not fit this base.
        """
        shape = tuple(batch.mean.shape[1:])
        latents = batch.mean + (batch.log_variance / 2).exp() * _draw(shape, batch, seed, "posterior", step)
        noise = _draw(shape, batch, seed, "noise", step)
        if self.settings.noise_offset:
            # Guttenberg 2023, "Diffusion with Offset Noise", crosslabs.org.
            shift = _draw((shape[0], 1, 1), batch, seed, "noise offset", step)
            noise = noise + self.settings.noise_offset * shift
        timesteps = self.draw_timesteps(
            batch.positions, batch.step_size, seed=seed, step=step, ranges=batch.ranges
        )
        noisy, target = _noisy_and_target(backbone.noise_schedule, latents, noise, timesteps)
        count, prior, conditioning = len(timesteps), batch.prior, batch.conditioning
        if prior is not None:
            # one pass for both: small batches leave cores idle
            noisy, target = torch.cat([noisy, prior.noisy]), torch.cat([target, prior.prediction])
            timesteps = torch.cat([timesteps, prior.timesteps])
            conditioning = {
                name: torch.cat([tensor, prior.conditioning[name].to(tensor)])
                for name, tensor in conditioning.items()
            }
        losses = self.losses_at(backbone, noisy, timesteps, target, conditioning)
        # a step holds `share` prior samples for each of its own, in the mean: so both sums weigh alike
        prior_weight = self.settings.prior.weight / self.settings.prior.share
        return losses[:count].sum() + prior_weight * losses[count:].sum(), count

    def prior_places(self, positions: Sequence[int], prior_size: int, *, seed: int, step: int) -> list[int]:
        """Draw which samples of the prior go beside the samples of a micro-batch.

        Of the positions 0, 1, 2, ... of a step, an even `share` brings one each, whatever the split.

        Args:
            prior_size: samples that there are to choose from.

        Returns:
            Indices into the prior, as many as there are positions that bring one.
        """
        share = self.settings.prior.share
        bringing = [p for p in positions if math.floor((p + 1) * share + 1e-9) > math.floor(p * share + 1e-9)]
        return [int(uniform((), seed, "prior", step, p).item() * prior_size) for p in bringing]

    @torch.no_grad()
    def validation_loss(self, backbone: ImageBackbone, batch: ImageBatch, *, seed: int) -> tuple[Tensor, int]:
        """Give the same as `loss`, averaged over fixed timesteps, on the posterior's mean and with fixed noise.

        Two calls with one seed differ only by what the model has learnt; nothing here has a gradient.
        """
        count = len(batch.positions)
        total = torch.zeros((), device=backbone.device)
        for timestep in self.settings.validation_timesteps:
            noise = _draw(tuple(batch.mean.shape[1:]), batch, seed, "validation", timestep)
            timesteps = torch.full((count,), timestep)
            noisy, target = _noisy_and_target(backbone.noise_schedule, batch.mean, noise, timesteps)
            losses = self.losses_at(backbone, noisy, timesteps, target, batch.conditioning)
            total = total + losses.sum() / len(self.settings.validation_timesteps)
        return total, count

    def losses_at(
        self,
        backbone: ImageBackbone,
        noisy: Tensor,
        timesteps: Tensor,
        target: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        """Give each sample's weighted loss at a timestep.

        Args:
            noisy: (B, C, h, w), float32.
            timesteps: (B,), int64.
            target: what the denoiser should say, (B, C, h, w), float32.

        Returns:
            (B,), float32, on the backbone's device.

        Raises:
            ConfigError: the weighting does not fit the base.
        """
        schedule = backbone.noise_schedule
        weight = self._weight(schedule, timesteps).to(backbone.device)
        noisy, target, timesteps = (x.to(backbone.device) for x in (noisy, target, timesteps))
        prediction = backbone.predict(noisy, timesteps, conditioning)
        if self.settings.loss == "huber":
            return weight * huber_error(prediction, target, self.settings.huber_delta)
        return weight * squared_error(prediction, target)

    def draw_timesteps(
        self,
        positions: Sequence[int],
        step_size: int,
        *,
        seed: int,
        step: int,
        ranges: Sequence[tuple[int, int] | None] | None = None,
    ) -> Tensor:
        """Draw one timestep per sample, spread evenly over the whole optimiser step (stratified).

        The step's samples share out `step_size` equal slices of the distribution, in a random order, so the
        timesteps of one step cover the range and the loss is less noisy than with independent draws.

        Returns:
            (len(positions),), int64, on the CPU, within each sample's range, by default `settings.timesteps`.
        """
        slices = permutation(step_size, seed, "timestep", step)
        within = [uniform((), seed, "timestep", step, position).item() for position in positions]
        place = [(slices[p] + u) / step_size for p, u in zip(positions, within, strict=True)]
        share = self.settings.noisy_share
        quantile = torch.tensor(
            [(q / (1 - share) if q < 1 - share else 1 + (q - 1 + share) / share) / 2 for q in place],
            dtype=torch.float64,
        )
        own = ranges or [None] * len(positions)
        first, last = torch.tensor([each or self.settings.timesteps for each in own]).T
        return torch.minimum((first + quantile * (last + 1 - first)).long(), last)

    def _weight(self, schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
        snr, gamma = schedule.snr(timesteps), self.settings.gamma
        match self.settings.weighting:
            case "min_snr":
                return min_snr_weight(snr, gamma, schedule.prediction)
            case "snr_plus_one":
                return snr_plus_one_weight(snr, gamma, schedule.prediction)
            case "debiased":
                return debiased_weight(snr, schedule.prediction)
            case "none":
                return torch.ones_like(snr)


def _draw(shape: tuple[int, ...], batch: ImageBatch, seed: int, purpose: str, place: int) -> Tensor:
    """Draw (B, *shape) normal noise, each sample from its own position."""
    return torch.stack([normal(shape, seed, purpose, place, position) for position in batch.positions])


def _noisy_and_target(
    schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    if int(timesteps.max()) >= schedule.timesteps:
        raise ConfigError(
            f"objective.timesteps: this base has timesteps 0 to {schedule.timesteps - 1}; got {int(timesteps.max())}"
        )
    return schedule.add_noise(latents, noise, timesteps), schedule.target(latents, noise, timesteps)
