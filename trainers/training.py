"""A training run from the recipe to the verified adapter."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmpeft import adapter_file, plugins
from mmpeft.adapter import AdapterCard
from mmpeft.backbones.base import ImageBackbone
from mmpeft.config import ComponentSettings, Recipe
from mmpeft.data.image_folder import ImageFolder
from mmpeft.data.lint import LintReport, lint
from mmpeft.data.tensor_cache import TensorCache
from mmpeft.errors import ConfigError, DataError
from mmpeft.injection import find_targets
from mmpeft.methods.base import Method
from mmpeft.randomness import reseed_globals
from mmpeft.trainers import artefact, launch, loop
from mmpeft.trainers.presets import resolve
from mmpeft.trainers.text_to_image import CaptionedImages, TextToImage, learning_parameters

_PACKAGES = ("mmpeft", "torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    adapter_dir: Path
    metrics: Mapping[str, Any]
    steps: int
    seconds: float
    """from the start of the process to the verified adapter"""
    verified: bool
    """whether stock diffusers, loading the folder, computes what was trained"""
    verification: str
    stopped_by: int | None = None
    """number of the signal that ended the run early, after a checkpoint"""

    def text(self) -> str:
        """Say it for the terminal."""
        if self.stopped_by:
            return f"stopped after step {self.steps}; a checkpoint is written: go on with --resume"
        return f"{self.steps} steps in {self.seconds:.0f} s\n{self.verification}\nthe adapter is in {self.adapter_dir}"


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before the loop starts."""

    recipe: Recipe
    backbone: ImageBackbone
    methods: Mapping[str, Method]
    folder: ImageFolder
    task: TextToImage
    lint_report: LintReport


def train(
    source: Recipe | Mapping[str, Any] | str | Path,
    *,
    base: str | None = None,
    out: str | Path | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> TrainResult:
    """Train an adapter and check that stock diffusers computes the same with it.

    Args:
        source: a folder of images, a recipe file, settings, or a Recipe.
        base: pocket, a folder, a single file, or a hub name.
        out: folder of the run.
        preset: settings to start from; `mmpeft.trainers.presets.names()` lists them.
        overrides: dotted or nested settings, which win.
        resume: go on from the newest checkpoint that verifies.

    Raises:
        ConfigError: a setting cannot be; or the folder holds a run and `resume` was not said.
        DataError: images or captions cannot be used.
        BaseError: the base cannot be opened.
        TrainingError: the loss is not finite, or the disk is full; the last checkpoint stands.
    """
    settings = {**(overrides or {}), **({"base.name": base} if base else {})}
    recipe = resolve(source, out=out, preset=preset, overrides=settings)
    if not resume and any((recipe.out / name).exists() for name in ("checkpoints", "adapter")):
        raise ConfigError(f"{recipe.out} holds a run; add --resume to go on with it, or choose another --out")
    accelerator = launch.accelerator(recipe.train.processes)
    prepared = prepare(recipe)
    if accelerator.is_main_process:
        print(prepared.lint_report.text(), flush=True)
        print(
            f"attention: {prepared.backbone.attention}; computing in {prepared.backbone.compute_dtype}",
            flush=True,
        )
    outcome = loop.train(
        prepared.task,
        recipe.train,
        seed=recipe.seed,
        out=recipe.out,
        recipe=recipe.dotted(),
        validate_every=recipe.validation.every if recipe.validation.images else None,
        preview_every=recipe.preview.every if recipe.preview.prompts else None,
        resume=resume,
        accelerator=accelerator,
    )
    adapter_dir = recipe.out / "adapter"
    if outcome.stopped_by:
        return TrainResult(adapter_dir, {}, outcome.steps, run_seconds(), True, "", outcome.stopped_by)
    if not accelerator.is_main_process:
        return TrainResult(adapter_dir, {}, outcome.steps, run_seconds(), True, "")
    report = artefact.finish(
        prepared.backbone, adapter_dir, captions=prepared.task.some_captions(4), preview=recipe.preview
    )
    metrics = {
        "steps": outcome.steps,
        "loop_seconds": round(outcome.seconds, 2),
        "images_per_second": round(outcome.samples / outcome.seconds, 2) if outcome.seconds else None,
        "train_seconds": round(run_seconds(), 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "trainable_parameters": prepared.task.trainable_parameters,
        "base_parameters": prepared.backbone.parameter_count,
        "train_loss": outcome.final_loss,
        "validation_loss": outcome.validation_loss,
        "best_step": outcome.best_step,
        "best_validation_loss": outcome.best_loss,
        "verification": asdict(report),
    }
    (recipe.out / "result.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return TrainResult(adapter_dir, metrics, outcome.steps, run_seconds(), report.is_ok, report.sentence)


def prepare(recipe: Recipe) -> Prepared:
    """Open the base, look through the data, attach the method: everything before the first step.

    Raises:
        ConfigError, DataError, BaseError, MethodError: as `train`.
    """
    backbone = plugins.get("backbone", recipe.base.backbone).open(recipe.base)
    if recipe.data.images is None:
        raise ConfigError("data.images: must name a folder of images")
    folder = plugins.get("dataset", recipe.data.name).scan(recipe.data.images, recipe.data)
    cache = TensorCache(recipe.cache or recipe.out / "cache")
    images = CaptionedImages(folder, backbone, cache, seed=recipe.seed, clip_skip=recipe.base.clip_skip)
    report = lint(
        folder,
        images.buckets,
        captions=images.captions(),
        token_count=backbone.token_count,
        token_limit=backbone.token_limit,
        step_size=recipe.train.step_size,
        trigger=folder.settings.trigger,
    )
    if report.errors:
        raise DataError(f"{report.errors[0].file or folder.folder}: {report.errors[0].message}")
    objective = plugins.get("objective", recipe.objective.name)(recipe.objective)
    components = {name: settings for name, settings in recipe.components.items() if settings.train}
    components = components or {backbone.main_component: ComponentSettings()}
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
    )
    return Prepared(recipe, backbone, methods, folder, task, report)


def attach(
    recipe: Recipe, backbone: ImageBackbone, components: Mapping[str, ComponentSettings]
) -> tuple[dict[str, Method], list[str]]:
    """Put the method's fresh parameters on each component that learns, or those of `init_from`.

    Returns:
        The method of each component, and the names on disk of all layers that learn.
    """
    start = adapter_file.load(recipe.init_from, backbone.components) if recipe.init_from else None
    methods: dict[str, Method] = {}
    names: list[str] = []
    for component, settings in components.items():
        if component not in backbone.components:
            known = ", ".join(sorted(backbone.components))
            raise ConfigError(f"components.{component}: this base has no such component; it has {known}")
        model = backbone.components[component]
        method = plugins.get("method", recipe.method.name)(recipe.method)
        targets = settings.targets or recipe.method.targets
        reseed_globals(recipe.seed, "initialise", component)
        layers = find_targets(component, model, backbone.target_groups, targets)
        method.attach(model, layers)
        if start is not None:
            method.start_from(model, start.component(component))
        methods[component] = method
        names += [f"{component}.{layer}" for layer in layers.values()]
    return methods, names


def run_seconds() -> float:
    """Give the seconds since this process started."""
    import psutil

    return time.time() - float(psutil.Process().create_time())


def peak_memory_bytes() -> int:
    """Give the most memory that this process ever held, bytes."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024
