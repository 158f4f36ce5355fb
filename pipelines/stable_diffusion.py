"""Stable Diffusion with a bank inside: each call may carry its own mix of adapters, or one for each prompt.

This file alone also works as a diffusers custom pipeline, where mmpeft is installed.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from mmpeft.bank import AdapterBank, attach
from mmpeft.batch_layout import BatchLayout
from mmpeft.errors import ConfigError
from mmpeft.mix import Mix

OneMix = Mix | Mapping[str, Any]
Adapters = OneMix | list[OneMix] | tuple[OneMix, ...]


class MmpeftStableDiffusionPipeline(StableDiffusionPipeline):  # type: ignore[misc]  # diffusers is not typed
    """diffusers' StableDiffusionPipeline, and beside its arguments `adapters=`.

    Calls from several threads follow one another, each with its own mix, because a call holds the bank's lock.
    """

    _bank: AdapterBank | None = None
    _attaching = threading.Lock()

    @property
    def bank(self) -> AdapterBank:
        """The bank on the pipeline's UNet and text encoder; attached when it is first asked for, or was detached."""
        with self._attaching:
            if self._bank is None or not self._bank.is_attached:
                self._bank = attach(self)
            return self._bank

    @classmethod
    def from_pipe(cls, pipeline: Any, **settings: Any) -> MmpeftStableDiffusionPipeline:
        """Make one that shares another pipeline's models, and one of ours' bank; see diffusers' `from_pipe`."""
        made: MmpeftStableDiffusionPipeline = super().from_pipe(pipeline, **settings)
        is_shared = made.unet is pipeline.unet and made.text_encoder is pipeline.text_encoder
        if is_shared and isinstance(pipeline, MmpeftStableDiffusionPipeline):
            made._bank = pipeline.bank
        return made

    @torch.no_grad()
    def __call__(self, *args: Any, adapters: Adapters | None = None, **kwargs: Any) -> Any:
        """Draw pictures as StableDiffusionPipeline does, with adapters of the bank.

        Args:
            adapters: the mix of this call (adapter name -> number, Weight, or numbers per block), or a list with one
                for each prompt; none leaves the bank's own mix.

        The other arguments, and what is returned, are those of StableDiffusionPipeline.

        Raises:
            ConfigError: not as many mixes as prompts, or mixes that cannot go into one batch.
            BankError: an adapter is not loaded, or weights per sample are not as many as prompts.
        """
        if self._bank is None and adapters is None:
            return super().__call__(*args, **kwargs)
        given = inspect.signature(super().__call__).bind(*args, **kwargs)
        given.apply_defaults()
        layout = self._layout(given.arguments)
        if adapters is None:
            with self.bank.batch(layout):
                return super().__call__(*args, **kwargs)
        mix = _one_mix(adapters, layout.prompts)
        with self.bank.using(mix), self.bank.batch(layout):
            return super().__call__(*args, **kwargs)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode prompts, then negative prompts, as diffusers does; the bank is told which of them it is at."""
        more = {"lora_scale": lora_scale, "clip_skip": clip_skip}
        prompts = _count(prompt, prompt_embeds)
        if self._bank is not None and prompt_embeds is None:
            with self._bank.batch(BatchLayout(prompts)):
                prompt_embeds, _ = super().encode_prompt(prompt, device, 1, False, **more)
        negative = BatchLayout(prompts, guidance="uncond")
        with self._bank.batch(negative) if self._bank is not None else nullcontext():
            encoded: tuple[Tensor, Tensor | None] = super().encode_prompt(
                prompt,
                device,
                num_images_per_prompt,
                do_classifier_free_guidance,
                negative_prompt,
                prompt_embeds,
                negative_prompt_embeds,
                **more,
            )
        return encoded

    def to_json_string(self) -> str:
        """Name the class that plain diffusers has: what is saved is the base, and loads without mmpeft."""
        return json.dumps({**json.loads(super().to_json_string()), "_class_name": "StableDiffusionPipeline"})

    def _layout(self, given: Mapping[str, Any]) -> BatchLayout:
        is_guided = given["guidance_scale"] > 1 and self.unet.config.time_cond_proj_dim is None
        return BatchLayout(
            _count(given["prompt"], given["prompt_embeds"]),
            given["num_images_per_prompt"],
            "uncond_first" if is_guided else "none",
        )


def _count(prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None) -> int:
    if prompt is not None and not isinstance(prompt, str):
        return len(prompt)
    return 1 if prompt is not None or prompt_embeds is None else prompt_embeds.shape[0]


def _one_mix(adapters: Adapters, prompts: int) -> Mix:
    if not isinstance(adapters, list | tuple):
        return Mix.of(adapters)
    if len(adapters) != prompts:
        raise ConfigError(
            f"adapters as a list are one mix for each prompt; got {len(adapters)} mixes and {prompts} prompts"
        )
    return Mix.for_prompts(adapters)
