"""Everything before the first step: the base opened, the data looked through, the prior drawn, the method attached."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from mmpeft import plugins
from mmpeft.adapter import load_adapter
from mmpeft.adapter_card import AdapterCard
from mmpeft.backbones.base import ImageBackbone
from mmpeft.config import ComponentSettings, Recipe
from mmpeft.data.captions import without_words
from mmpeft.data.findings import Finding
from mmpeft.data.image_folder import ImageFolder, ImageFolderSettings
from mmpeft.data.lint import LintReport, lint
from mmpeft.data.pictures import fit
from mmpeft.data.restyle import restyle
from mmpeft.data.tensor_cache import TensorCache
from mmpeft.diffusion.denoise import PriorSettings
from mmpeft.diffusion.prior import Prior, draw_prior
from mmpeft.errors import ConfigError, DataError, MethodError
from mmpeft.evaluation.trigger import SEEN, trigger_visibility
from mmpeft.injection import find_targets
from mmpeft.methods.base import Method
from mmpeft.randomness import reseed_globals
from mmpeft.routing import embedding_of
from mmpeft.trainers import checkpoint
from mmpeft.trainers.text_to_image import CaptionedImages, TextToImage, learning_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

# Of this many captions, spread over the folder, the mean is taken that tells what an adapter is about.
_EMBEDDED_CAPTIONS = 64
_PACKAGES = ("mmpeft", "torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before the loop starts."""

    recipe: Recipe
    backbone: ImageBackbone
    methods: Mapping[str, Method]
    folder: ImageFolder
    task: TextToImage
    lint_report: LintReport
    prior_seconds: float
    """that the base's own drawings took, restyling included"""


@dataclass(frozen=True)
class Looked:
    """The base and the data, before anything is changed or computed; errors stand in the report."""

    backbone: ImageBackbone
    images: CaptionedImages
    components: Mapping[str, ComponentSettings]
    """those that learn"""
    lint_report: LintReport


def look(recipe: Recipe) -> Looked:
    """Open the base and look through the data.

    Raises:
        ConfigError, DataError, BaseError: as `train`, except that what lint finds is told and not raised.
    """
    data = recipe.data
    if not isinstance(data, ImageFolderSettings):
        raise ConfigError(f"data.name: {data.name!r} holds no images, and this backbone learns from images")
    if data.images is None:
        raise ConfigError("data.images: must name a folder of images")
    backbone = plugins.get("backbone", recipe.base.backbone).open(recipe.base)
    folder = plugins.get("dataset", data.name).scan(data.images, data)
    images = CaptionedImages(
        folder, backbone, cache_of(recipe), seed=recipe.seed, clip_skip=recipe.base.clip_skip
    )
    report = lint(
        folder,
        images.buckets,
        captions=images.captions(),
        token_count=backbone.token_count,
        token_limit=backbone.token_limit,
        step_size=recipe.train.step_size,
        trigger=folder.settings.trigger,
    )
    components = {name: settings for name, settings in recipe.components.items() if settings.train}
    components = components or {backbone.main_component: ComponentSettings()}
    more = trigger_findings(backbone, images, components)
    if data.crop == "random":
        message = (
            "random crop is drawn anew at each visit: latents are not cached, and each step runs the VAE"
        )
        more.append(Finding("note", None, message, "cache"))
    return Looked(backbone, images, components, replace(report, findings=(*report.findings, *more)))


def prepare(recipe: Recipe, accelerator: Accelerator | None = None, looked: Looked | None = None) -> Prepared:
    """Open the base, look through the data, draw the prior, attach the method: everything before the first step.

    Args:
        accelerator: of a run in several processes, which share the work.
        looked: what `look` gave for this recipe, if that was done already.

    Raises:
        ConfigError, DataError, BaseError, MethodError: as `train`.
    """
    looked = looked or look(recipe)
    backbone, images, components, report = (
        looked.backbone,
        looked.images,
        looked.components,
        looked.lint_report,
    )
    folder, cache = images.folder, cache_of(recipe)
    if report.errors:
        raise DataError(f"{report.errors[0].file or folder.folder}: {report.errors[0].message}")
    objective = plugins.get("objective", recipe.objective.name)(recipe.objective)
    began = time.perf_counter()
    prior = prior_of(recipe, backbone, images, cache, accelerator)
    restyled = restyled_images(recipe, backbone, images, cache, prior, accelerator)
    prior_seconds = time.perf_counter() - began
    embedding = caption_embedding(recipe, images)
    methods, layers = attach(recipe, backbone, components)
    groups = learning_parameters(
        methods,
        backbone.components,
        learning_rate={
            name: part.learning_rate or recipe.train.learning_rate for name, part in components.items()
        },
        stop_after={name: part.stop_after for name, part in components.items()},
    )
    held_out = None
    if recipe.validation.images:
        held_out_folder = type(folder).scan(
            recipe.validation.images, folder.settings.model_copy(update={"flip": False, "crop": "center"})
        )
        held_out = CaptionedImages(
            held_out_folder, backbone, cache, seed=recipe.seed, clip_skip=recipe.base.clip_skip
        )
    card = AdapterCard(
        base=backbone.title,
        fingerprint=backbone.fingerprint(layers).to_json(),
        data_digest=folder.digest,
        trigger=folder.settings.trigger,
        seed=recipe.seed,
        recipe=recipe.public(
            {
                "base.name": backbone.title,
                "data.images": folder.digest,
                "validation.images": held_out.folder.digest if held_out else None,
            }
        ),
        versions={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        embedding=embedding,
    )
    task = TextToImage(
        backbone,
        methods,
        objective,
        images,
        parameter_groups=groups,
        seed=recipe.seed,
        card=card,
        held_out=held_out,
        preview=recipe.preview,
        restyled=restyled,
        prior=prior,
    )
    return Prepared(recipe, backbone, methods, folder, task, report, prior_seconds)


def cache_of(recipe: Recipe) -> TensorCache:
    """Open the cache of a run."""
    return TensorCache(recipe.cache or recipe.out / "cache")


def attach(
    recipe: Recipe, backbone: ImageBackbone, components: Mapping[str, ComponentSettings]
) -> tuple[dict[str, Method], list[str]]:
    """Put the method's fresh parameters on each component that learns, or those of `init_from`.

    Returns:
        The method of each component, and the names on disk of all layers that learn.
    """
    start = load_adapter(recipe.init_from, backbone.components) if recipe.init_from else None
    methods: dict[str, Method] = {}
    names: list[str] = []
    for component, settings in components.items():
        if component not in backbone.components:
            known = ", ".join(sorted(backbone.components))
            raise ConfigError(f"components.{component}: this base has no such component; it has {known}")
        model = backbone.components[component]
        method: Method = plugins.get("method", recipe.method.name)(recipe.method)
        targets = settings.targets or method.settings.targets
        reseed_globals(recipe.seed, "initialise", component)
        layers = find_targets(component, model, backbone.target_groups, targets)
        method.attach(model, layers)
        if start is not None:
            method.start_from(model, start.component(component))
        methods[component] = method
        names += [f"{component}.{layer}" for layer in layers.values()]
    unused = frozenset.intersection(*(method.unused_patterns for method in methods.values()))
    if unused:
        raise MethodError(
            f"method: the pattern {sorted(unused)[0]!r} names no layer that learns; correct or remove it"
        )
    return methods, names


def prior_of(
    recipe: Recipe,
    backbone: ImageBackbone,
    images: CaptionedImages,
    cache: TensorCache,
    accelerator: Accelerator | None,
) -> Prior | None:
    """Let the base draw what is to stay: the folder's captions without the trigger, in turn with the given prompts."""
    settings = prior_settings(recipe)
    if not settings.pictures:
        return None
    trigger = images.folder.settings.trigger or ""
    own = [without_words(record.caption or "", trigger) for record in images.folder.records]
    both = chain.from_iterable(zip_longest(own, settings.prompts))
    prompts = list(dict.fromkeys(prompt for prompt in both if prompt))[: settings.pictures]
    if not prompts:
        raise ConfigError("objective.prior.prompts: the folder has no captions to draw; name some prompts")
    return draw_prior(
        backbone,
        prompts,
        cache,
        seed=recipe.seed,
        process=accelerator.process_index if accelerator else 0,
        processes=accelerator.num_processes if accelerator else 1,
    )


def restyled_images(
    recipe: Recipe,
    backbone: ImageBackbone,
    images: CaptionedImages,
    cache: TensorCache,
    prior: Prior | None,
    accelerator: Accelerator | None,
) -> CaptionedImages | None:
    """Give the prior's drawings the folder's contrast and colours, as samples; out/restyled has them to look at."""
    settings = prior_settings(recipe)
    if prior is None or not settings.restyled:
        return None
    folder = recipe.out / "restyled"
    if accelerator is None or accelerator.is_main_process:
        side = backbone.resolution
        reference = [
            fit(images.folder.picture(place), side, side) for place in range(len(images.folder.records))
        ]
        pictures = restyle(backbone.decode_image(prior.latents), reference, seed=recipe.seed)

        def write(into: Path) -> None:
            for place, (picture, prompt) in enumerate(zip(pictures, prior.drawn, strict=True)):
                picture.save(into / f"{place:04d}.png")
                (into / f"{place:04d}.txt").write_text(prompt + "\n", encoding="utf-8")

        folder.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.replace_folder(folder, write)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    # not mirrored: the base's own shapes are what these pictures keep
    changes = {"images": folder, "flip": False, "crop": "center", "repeats": settings.restyled}
    scanned = ImageFolder.scan(folder, images.folder.settings.model_copy(update=changes))
    return CaptionedImages(
        scanned,
        backbone,
        cache,
        seed=recipe.seed,
        clip_skip=recipe.base.clip_skip,
        timesteps=settings.restyled_timesteps,
    )


def caption_embedding(recipe: Recipe, images: CaptionedImages) -> list[float] | None:
    """Embed what the captions say on the whole, for the card.

    Returns:
        The mean over captions and tokens, with 4 digits. None for so few captions that it would give them away, and
        with clip skip, whose states no pipeline makes from a prompt by itself.
    """
    captions = list(dict.fromkeys(images.captions()))
    if len(captions) < 3 or recipe.base.clip_skip:
        return None
    some = captions[:: -(-len(captions) // _EMBEDDED_CAPTIONS)]
    states = images.conditioning(["", *some]).get("text")
    if states is None or states.ndim != 3:
        return None
    return [round(value, 4) for value in embedding_of(states).mean(0).tolist()]


def trigger_findings(
    backbone: ImageBackbone, images: CaptionedImages, components: Mapping[str, ComponentSettings]
) -> list[Finding]:
    """Warn of a trigger that a frozen text encoder hardly sees, since no training can then keep a style behind it."""
    trigger = images.folder.settings.trigger
    called = images.captions()[:16]
    plain = [without_words(caption, trigger or "") for caption in called]
    if not trigger or len(set(plain)) < 2 or any(name.startswith("text_encoder") for name in components):
        return []
    visibility = trigger_visibility(backbone, called, plain)
    if visibility >= SEEN:
        return []
    message = (
        f"the text encoder hardly sees {trigger!r}: it moves a caption by {visibility:.2f} of the distance to another "
        f"caption, {SEEN} is seen. What is learnt will leak into prompts without it; take words that the base knows, "
        f"as in 'in the style of {trigger}', or let components.text_encoder learn"
    )
    return [Finding("warning", None, message, "trigger")]


def prior_settings(recipe: Recipe) -> PriorSettings:
    """Give what the objective says about the prior; an objective from elsewhere may know none."""
    return getattr(recipe.objective, "prior", PriorSettings())
