"""What the loop needs to know about training on images with captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from mmpeft.adapter import Adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.backbones.base import ImageBackbone
from mmpeft.config import PreviewSettings
from mmpeft.data.buckets import Bucket, choose_bucket, crop_offset, is_flipped, make_buckets
from mmpeft.data.captions import final_caption
from mmpeft.data.image_folder import ImageFolder
from mmpeft.data.pictures import fit, pixels
from mmpeft.data.tensor_cache import TensorCache, latent_key, text_key
from mmpeft.diffusion.denoise import Denoise, ImageBatch, PriorBatch
from mmpeft.diffusion.prior import Prior
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.base import Method
from mmpeft.trainers.loop import ParameterGroup

Samples = Sequence[tuple[int, int]]
"""(position in the optimiser step, sample index) of each sample of a micro-batch"""


class CaptionedImages:
    """The samples of an image folder, as the backbone is fed with them; what frozen models make of them is cached.

    Args:
        timesteps: first and last timestep that they are taught at; none leaves it to the objective.
    """

    def __init__(
        self,
        folder: ImageFolder,
        backbone: ImageBackbone,
        cache: TensorCache,
        *,
        seed: int,
        clip_skip: int,
        timesteps: tuple[int, int] | None = None,
    ) -> None:
        settings = folder.settings
        self.timesteps = timesteps
        self.folder = folder
        self.buckets = make_buckets(
            settings.resolution or backbone.resolution, backbone.size_multiple, settings.max_aspect
        )
        self._backbone = backbone
        self._cache = cache
        self._seed = seed
        self._clip_skip = clip_skip
        # What was read once stays in memory, bounded: at Stable Diffusion's size 512 entries are 64 and 120 MB.
        self._posterior_of = lru_cache(maxsize=512)(self._cached_posterior)
        self._embedding_of = lru_cache(maxsize=512)(self._cached_embedding)

    def bucket(self, sample: int) -> Bucket:
        """Give the size at which a sample is trained on."""
        return choose_bucket(self.folder.records[self.folder.samples[sample]].size, self.buckets)

    def caption(self, sample: int, epoch: int, *, dropout: bool = True) -> str:
        """Say what the model reads for a sample at a visit."""
        return self._final(self.folder.samples[sample], sample, epoch, dropout=dropout)

    def captions(self) -> list[str]:
        """Say for each record what the model reads at the first visit, without dropout."""
        return [self._final(place, place, 0, dropout=False) for place in range(len(self.folder.records))]

    def _final(self, place: int, sample: int, epoch: int, *, dropout: bool) -> str:
        settings = self.folder.settings
        return final_caption(
            self.folder.records[place].caption,
            trigger=settings.trigger,
            trigger_position=settings.trigger_position,
            dropout=settings.caption_dropout if dropout else 0.0,
            shuffle_tags=settings.shuffle_tags,
            keep_tags=settings.keep_tags,
            seed=self._seed,
            epoch=epoch,
            index=sample,
        )

    def posterior(self, sample: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Give the latents' mean and log-variance of a sample at a visit, each (C, h, w), float32."""
        settings = self.folder.settings
        place, bucket = self.folder.samples[sample], self.bucket(sample)
        flip = settings.flip and is_flipped(self._seed, epoch, sample)
        if settings.crop == "random":
            return self._encode(place, bucket, *crop_offset(self._seed, epoch, sample), flip)
        return self._posterior_of(place, bucket, flip)

    def conditioning(self, captions: Sequence[str], *, cached: bool = True) -> dict[str, Tensor]:
        """Encode final captions; not cached while the text encoder learns."""
        if not cached:
            return self._backbone.encode_text(captions)
        found = [self._embedding_of(caption) for caption in captions]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    def _cached_posterior(self, place: int, bucket: Bucket, flip: bool) -> tuple[Tensor, Tensor]:
        def make() -> dict[str, Tensor]:
            mean, log_variance = self._encode(place, bucket, 0.5, 0.5, flip)
            return {"mean": mean, "log_variance": log_variance}

        digest = self.folder.records[place].digest
        key = latent_key(digest, bucket, 0.5, 0.5, flip, self._backbone.vae_fingerprint)
        found = self._cache.get(key, make)
        return found["mean"], found["log_variance"]

    @torch.no_grad()
    def _encode(
        self, place: int, bucket: Bucket, left: float, top: float, flip: bool
    ) -> tuple[Tensor, Tensor]:
        picture = fit(self.folder.picture(place), bucket.width, bucket.height, left, top)
        if flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # One at a time: the numbers must not depend on what else happened to be missing in the cache.
        mean, log_variance = self._backbone.encode_image(pixels(picture)[None])
        return mean[0].cpu(), log_variance[0].cpu()

    def _cached_embedding(self, caption: str) -> dict[str, Tensor]:
        @torch.no_grad()
        def make() -> dict[str, Tensor]:
            return {
                name: tensor[0].contiguous() for name, tensor in self._backbone.encode_text([caption]).items()
            }

        # The backbone's text fingerprint covers the tokenizer.
        key = text_key(caption, "", self._backbone.text_fingerprint, self._clip_skip)
        return self._cache.get(key, make)


class TextToImage:
    """The loop's task: a method on an image backbone learns a folder of captioned images."""

    def __init__(
        self,
        backbone: ImageBackbone,
        methods: Mapping[str, Method],
        objective: Denoise,
        images: CaptionedImages,
        *,
        parameter_groups: Sequence[ParameterGroup],
        seed: int,
        card: AdapterCard,
        held_out: CaptionedImages | None = None,
        preview: PreviewSettings | None = None,
        restyled: CaptionedImages | None = None,
        prior: Prior | None = None,
    ) -> None:
        sets = [images] if restyled is None else [images, restyled]
        self._places = [(each, sample) for each in sets for sample in range(len(each.folder.samples))]
        self.groups = [each.bucket(sample) for each, sample in self._places]
        self.parameter_groups = parameter_groups
        self._backbone = backbone
        self._methods = methods
        self._objective = objective
        self._images = images
        self._seed = seed
        self._card = card
        self._held_out = held_out
        self._preview = preview or PreviewSettings()
        self._prior = prior
        # bfloat16 and float32 have the range; float16 would round small gradients to 0
        self.loss_scale = 1024.0 if backbone.compute_dtype == torch.float16 else 1.0
        self._text_learns = any(name.startswith("text_encoder") for name in methods)

    def loss(self, samples: Samples, *, step: int, epoch: int, step_size: int) -> tuple[Tensor, int]:
        """Compute the loss sum and the sample count of a micro-batch."""
        positions = tuple(position for position, _ in samples)
        chosen = [self._places[index] for _, index in samples]
        posteriors = [images.posterior(sample, epoch) for images, sample in chosen]
        mean, log_variance = (torch.stack(parts) for parts in zip(*posteriors, strict=True))
        batch = ImageBatch(
            mean=mean,
            log_variance=log_variance,
            conditioning=self._conditioning([images.caption(sample, epoch) for images, sample in chosen]),
            positions=positions,
            step_size=step_size,
            ranges=tuple(images.timesteps for images, _ in chosen),
            prior=self._prior_beside(positions, step),
        )
        return self._objective.loss(self._backbone, batch, seed=self._seed, step=step)

    def _prior_beside(self, positions: Sequence[int], step: int) -> PriorBatch | None:
        if self._prior is None:
            return None
        places = self._objective.prior_places(positions, len(self._prior), seed=self._seed, step=step)
        if not places:
            return None
        return PriorBatch(
            noisy=self._prior.noisy[places],
            timesteps=self._prior.timesteps[places],
            prediction=self._prior.prediction[places],
            conditioning=self._conditioning([self._prior.prompts[place] for place in places]),
        )

    def _conditioning(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return self._images.conditioning(captions, cached=not self._text_learns)

    @property
    def trainable_parameters(self) -> int:
        """Count the numbers that learn."""
        return sum(p.numel() for group in self.parameter_groups for p in group.parameters.values())

    @property
    def prior_share(self) -> float:
        """Give the share of what goes through the model that is the frozen base's own prior."""
        beside = self._objective.settings.prior.share if self._prior is not None else 0.0
        return round(beside / (1 + beside), 4)

    def some_captions(self, count: int) -> list[str]:
        """Give up to `count` different captions as the model reads them, without dropout."""
        return list(dict.fromkeys(self._images.captions()))[:count]

    def sample_names(self, indices: Sequence[int]) -> list[str]:
        """Name the files of samples."""
        chosen = [self._places[index] for index in indices]
        return [images.folder.records[images.folder.samples[sample]].name for images, sample in chosen]

    @torch.no_grad()
    def validate(self) -> float | None:
        """Compute the mean loss on the held-out images at fixed timesteps and noise; None without any."""
        if self._held_out is None:
            return None
        total, count = 0.0, 0
        for sample in range(len(self._held_out.folder.samples)):
            mean, log_variance = self._held_out.posterior(sample, epoch=0)
            batch = ImageBatch(
                mean=mean[None],
                log_variance=log_variance[None],
                conditioning=self._conditioning([self._held_out.caption(sample, 0, dropout=False)]),
                positions=(sample,),
                step_size=len(self._held_out.folder.samples),
            )
            loss, samples = self._objective.validation_loss(self._backbone, batch, seed=self._seed)
            total, count = total + float(loss), count + samples
        return total / count

    def preview(self, step: int, folder: Path) -> None:
        """Draw the preview prompts, each with its own seed and size, as PNG files in their order."""
        for place, wanted in enumerate(self._preview.prompts):
            (picture,) = self._backbone.generate(
                [wanted.prompt],
                negative_prompts=[wanted.negative_prompt],
                seeds=[wanted.seed],
                steps=self._preview.steps,
                guidance=self._preview.guidance,
                width=wanted.width,
                height=wanted.height,
            )
            picture.save(folder / f"{place}.png")

    def adapter(self, *, step: int, metrics: Mapping[str, float]) -> Adapter:
        """Copy the trained state out, with its card."""
        layers: dict[str, LayerAdapter] = {}
        for component, method in self._methods.items():
            state = method.layer_adapters(self._backbone.components[component])
            layers |= {f"{component}.{name}": layer for name, layer in state.items()}
        card = AdapterCard(**{**vars(self._card), "steps": step, "metrics": dict(metrics)})
        return Adapter(layers, card)

    def save(self, folder: Path, *, step: int, metrics: Mapping[str, float]) -> None:
        """Write the adapter folder."""
        self.adapter(step=step, metrics=metrics).save(folder)


def learning_parameters(
    methods: Mapping[str, Method],
    models: Mapping[str, nn.Module],
    *,
    learning_rate: Mapping[str, float],
    stop_after: Mapping[str, float],
) -> list[ParameterGroup]:
    """Collect the trainable parameters, a group a component."""
    return [
        ParameterGroup(
            name=component,
            parameters=method.parameters(models[component]),
            learning_rate=learning_rate[component],
            stop_after=stop_after[component],
        )
        for component, method in methods.items()
    ]
