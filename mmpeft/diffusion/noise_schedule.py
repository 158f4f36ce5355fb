"""How much noise a latent carries at each timestep, and what the denoiser is asked to say about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from mmpeft.errors import BaseError

Prediction = Literal["epsilon", "v", "flow"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving schedule: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.

    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, eq. 4.

    Args:
        alphas_cumprod: abar, the share of the signal's power that is left at each timestep, (timesteps,), float32,
            on the CPU, falling, in [0, 1); the last may be exactly 0 (zero terminal SNR).
        prediction: what the denoiser predicts, epsilon or v.
    """

    alphas_cumprod: Tensor
    prediction: Prediction

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a schedule from the configuration of any diffusers scheduler (`scheduler_config.json`).

        `rescale_betas_zero_snr` shifts and stretches sqrt(abar) so that its last value is 0: Lin et al. 2023,
        "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891, algorithm 1.

        Raises:
            BaseError: a beta schedule or prediction type that this kit does not train.
        """
        predictions: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in predictions:
            raise BaseError(
                f"the base predicts {prediction_type!r}; this backbone trains models that predict "
                f"'epsilon' or 'v_prediction'"
            )
        alphas_cumprod = (1 - _betas(config).double()).cumprod(0)
        if config.get("rescale_betas_zero_snr"):
            signal = alphas_cumprod.sqrt()
            first, last = signal[0].clone(), signal[-1].clone()
            alphas_cumprod = ((signal - last) * (first / (first - last))).square()
        return cls(alphas_cumprod.float(), predictions[prediction_type])

    @property
    def timesteps(self) -> int:
        """How many timesteps there are; the last is the noisiest."""
        return len(self.alphas_cumprod)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Give the signal-to-noise power ratio abar / (1 - abar).

        Args:
            timesteps: (B,), int64.

        Returns:
            (B,), float32, >= 0, on the timesteps' device.
        """
        abar = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return abar / (1 - abar)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mix latents with noise: signal * latents + sigma * noise.

        Args:
            latents: (B, C, h, w), float32, in the denoiser's scale.
            noise: (B, C, h, w), standard normal.
            timesteps: (B,), int64.

        Returns:
            (B, C, h, w), float32.
        """
        signal, sigma = self._shares(timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Give what the denoiser should say: the noise, or v = signal * noise - sigma * latents.

        Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", arXiv:2202.00512,
        appendix D. Shapes as in `add_noise`.
        """
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._shares(timesteps)
        return signal * noise - sigma * latents

    def x0_of(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Give the clean latents that a prediction for noisy latents stands for.

        Shapes as in `add_noise`. For epsilon the last timestep of a zero-terminal-SNR schedule says nothing
        about the picture: the result there is not finite.
        """
        signal, sigma = self._shares(timesteps)
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / signal
        return signal * noisy - sigma * prediction

    def noise_of(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Give the noise that a prediction for noisy latents stands for; shapes as in `add_noise`."""
        if self.prediction == "epsilon":
            return prediction
        signal, sigma = self._shares(timesteps)
        return sigma * noisy + signal * prediction

    def _shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod.to(timesteps.device)[timesteps][:, None, None, None]
        return abar.sqrt(), (1 - abar).sqrt()


def _betas(config: Mapping[str, Any]) -> Tensor:
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    count = config.get("num_train_timesteps", 1000)
    first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(first, last, count, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, count, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":
        # Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17.
        abar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(abar)])
    raise BaseError(
        f"the base's beta schedule {kind!r} is not known; known are 'linear', 'scaled_linear' and "
        f"'squaredcos_cap_v2'"
    )
