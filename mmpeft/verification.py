"""Check that stock diffusers computes with a saved adapter what the trained model computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpeft.randomness import normal

TIMESTEPS = (50, 500, 950)
# Of the adapter's own effect.
ALLOWED_DIFFERENCE = 0.01
# Of the prediction: float32 sums of some thousand terms in another order differ by less.
NUMERICAL_NOISE = 1e-5


@dataclass(frozen=True)
class VerificationReport:
    """What the check found.

    Args:
        difference: ‖reloaded − trained‖, of predictions.
        effect: ‖trained − base‖, what the adapter does.
        noise: what float32 rounding alone may do to a prediction.
    """

    difference: float
    effect: float
    noise: float

    @property
    def is_ok(self) -> bool:
        """Whether the adapter does something, and the reloaded one does the same."""
        return self.effect > self.noise and self.difference <= ALLOWED_DIFFERENCE * self.effect

    @property
    def sentence(self) -> str:
        """The finding in words."""
        if not self.effect > self.noise:  # also where it is no number
            return (
                f"not verified: the adapter changes the prediction by {self.effect:.2g}, no more than rounding does "
                f"({self.noise:.2g}); it has learned nothing, or was not saved"
            )
        share = f"{100 * self.difference / self.effect:.2g} % of the adapter's effect"
        if self.is_ok:
            return f"verified: reloaded in stock diffusers, the prediction differs by {share}"
        return f"not verified: reloaded in stock diffusers, the prediction differs by {share}; 1 % is allowed"


def verify(
    folder: str | Path, plain_pipeline: Any, trained: Any, *, prompts: Sequence[str], seed: int = 0
) -> VerificationReport:
    """Reload a saved adapter in a stock pipeline and compare predictions, from the prompt on, with the trained model's.

    Args:
        folder: the saved adapter.
        plain_pipeline: a diffusers pipeline of the base in float32, without adapters; left so.
        trained: a pipeline around the trained modules in float32, or a function of (prompts, seed) that gives their
            prediction as `predict` does.
        prompts: captions to condition on; with the trigger, if the adapter has one.
        seed: of the noise that is denoised.

    Raises:
        Whatever `load_lora_weights` raises where it cannot read the folder.
    """
    base = predict(plain_pipeline, prompts, seed)
    plain_pipeline.load_lora_weights(str(folder))
    try:
        reloaded = predict(plain_pipeline, prompts, seed)
    finally:
        plain_pipeline.unload_lora_weights()
    learned = predict(trained, prompts, seed) if hasattr(trained, "unet") else trained(prompts, seed)
    learned = learned.to(base)
    return VerificationReport(
        difference=float((reloaded - learned).norm()),
        effect=float((learned - base).norm()),
        noise=NUMERICAL_NOISE * float(base.norm()),
    )


@torch.no_grad()
def predict(pipeline: Any, prompts: Sequence[str], seed: int = 0) -> Tensor:
    """Run text encoder and denoiser of a Stable Diffusion pipeline at early, middle and late timesteps, unguided.

    Args:
        prompts: one sample each, B of them.
        seed: of the standard normal noise that stands for the noisy latents.

    Returns:
        (3 B, C, h, w), float32, on the CPU.
    """
    unet = pipeline.unet
    text, _ = pipeline.encode_prompt(list(prompts), unet.device, 1, do_classifier_free_guidance=False)
    side = unet.config.sample_size
    noise = normal((len(prompts), unet.config.in_channels, side, side), seed, "verification")
    noise = noise.to(unet.device, unet.dtype)
    steps = [
        unet(noise, timestep, encoder_hidden_states=text.to(unet.dtype)).sample for timestep in TIMESTEPS
    ]
    return torch.cat(steps).float().cpu()
