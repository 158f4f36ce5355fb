"""The contract of a backbone: one family of frozen models, and all contact with the library that holds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn

from mmpeft.backbones.fingerprint import Fingerprint
from mmpeft.config import BaseSettings
from mmpeft.diffusion.noise_schedule import NoiseSchedule


class Backbone(ABC):
    """A base model, frozen, with names for its parts."""

    components: dict[str, nn.Module]
    """the modules that can be adapted, by component name; all frozen, in evaluation mode"""
    main_component: str
    """the component that learns when a recipe names none"""
    target_groups: ClassVar[Mapping[str, tuple[str, ...]]]
    """what a recipe may call a group of layers -> patterns on layer names on disk without the component"""

    parameter_count: int
    """parameters of the whole base"""

    @classmethod
    @abstractmethod
    def open(cls, settings: BaseSettings) -> Self:
        """Load a base from what the recipe says, in the precision and with the attention that it asks for.

        Raises:
            BaseError: it cannot be found, reached or read; the sentence says what to do.
        """

    @property
    @abstractmethod
    def title(self) -> str:
        """The name to put on an adapter's card: a hub name or a plain name, never a path."""

    @abstractmethod
    def fingerprint(self, layers: Sequence[str]) -> Fingerprint:
        """Sketch the base's own weights of some layers, without what adapters add.

        Args:
            layers: names on disk with the component in front.

        Raises:
            BaseError: the base has no such layer.
        """


class ImageBackbone(Backbone):
    """A text-to-image base."""

    size_multiple: int
    """picture sides are multiples of this: the VAE's factor times the denoiser's downsampling"""
    resolution: int
    """the square side that the base was made for, pixels"""
    noise_schedule: NoiseSchedule
    vae_fingerprint: str
    """digest of the VAE's weights and scaling"""
    text_fingerprint: str
    """digest of the text encoders' weights and the tokenizers' files"""
    denoiser_fingerprint: str
    """digest of the denoiser's own weights and of the type that it computes in"""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of a square picture at `resolution`"""
    token_limit: int
    """tokens that fit, without the begin and end marks"""
    compute_dtype: torch.dtype
    """what the frozen model computes in"""
    device: torch.device
    """where the models are"""
    attention: str
    """which attention is active, in one line"""

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures into the VAE's posterior.

        Args:
            pixels: (B, 3, H, W), float32, in [-1, 1].

        Returns:
            Mean and log-variance, each (B, C, h, w), float32, in the denoiser's scale.
        """

    @abstractmethod
    def decode_image(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents, (B, C, h, w), in the denoiser's scale, into pictures."""

    @abstractmethod
    def token_count(self, caption: str) -> int:
        """Count the tokens of a caption, without marks, padding or truncation."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode captions into what the denoiser is conditioned on, float32, batch first; gradients flow if any."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the denoiser.

        Args:
            noisy: (B, C, h, w), float32, on `device`.
            timesteps: (B,), int64, 0..999, on `device`.
            conditioning: from `encode_text`, on any device.

        Returns:
            (B, C, h, w), float32: epsilon or v, as `noise_schedule.prediction` says.
        """

    @abstractmethod
    def pipeline(self) -> Any:
        """Give a diffusers pipeline around the live modules (not a copy), in evaluation mode."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        width: int | None = None,
        height: int | None = None,
    ) -> list[Image.Image]:
        """Draw a picture for each prompt from its own seed; a picture does not depend on its neighbours' seeds."""

    @abstractmethod
    def plain_pipeline(self) -> Any:
        """Load the base anew as a stock diffusers pipeline in float32, to check an artefact against."""

    @abstractmethod
    def exactly(self) -> AbstractContextManager[None]:
        """Compute in float32 within a with block, to compare with `plain_pipeline`."""
