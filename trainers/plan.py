"""What a run will be like, said before time is spent: data, memory, disk and time. Nothing is trained.

How far the estimates were off on the pocket base (LoRA on all layers, one thread, batch 1 to 32): a step's time by up
to a third (batch 1, 4, 8, 16, 32 in bf16: 0.20, 0.30, 0.43, 0.88, 1.5 s estimated; 0.20, 0.36, 0.63, 0.85, 1.45 s of
processor time measured); a step's memory by up to a fifth from batch 8 on, in bf16 and fp32, and by 80 MB too low
below. On a machine that does other things a run takes as much longer as they take.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.attention import measure_attention
from mmpeft.backbones.base import ImageBackbone
from mmpeft.config import Recipe
from mmpeft.data.buckets import Bucket, choose_bucket
from mmpeft.data.contact_sheet import contact_sheet
from mmpeft.data.findings import Finding
from mmpeft.data.lint import LintReport
from mmpeft.trainers.cost import Cost, count, measure_speed
from mmpeft.trainers.preparation import Looked, attach, look, prepare
from mmpeft.trainers.presets import resolve
from mmpeft.trainers.text_to_image import TextToImage

# Working copies of kernels and what the allocator keeps, over what a step's tensors hold: measured 1.8 to 2.1.
WORKING_COPIES = 2.0
# Numbers that an optimiser keeps for each that learns.
_MOMENTS = {"adamw": 2.0, "adamw8bit": 0.5, "prodigy": 4.0, "adafactor": 0.1}
_PRIOR_STEPS = 20
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Measured:
    """What real steps took.

    Attributes:
        seconds: of a micro-batch by bucket ("64x64").
        peak_bytes: most memory that this process held, ever.
        attention: seconds of a step by attention; empty when the recipe names one.
    """

    seconds: Mapping[str, float]
    peak_bytes: int
    attention: Mapping[str, float]


@dataclass(frozen=True)
class PlanReport:
    """What `plan` found.

    Attributes:
        out: folder with plan.json and contact_sheet.png.
        lint: what was found in the data.
        setting: the run in words: base, attention, precision.
        trainable_parameters: numbers that learn.
        steps: optimiser steps.
        epochs: times that each image is visited.
        memory: bytes by what holds them while training; and at the check in stock diffusers at the end.
        disk: bytes by what is written.
        seconds: by what takes them, on a machine that does nothing else.
        measured: with `measure`; then `seconds` counts on it.
    """

    out: Path
    lint: LintReport
    setting: Mapping[str, str]
    trainable_parameters: int
    steps: int
    epochs: float
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    seconds: Mapping[str, float]
    measured: Measured | None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What must be mended before training."""
        return self.lint.errors

    @property
    def peak_bytes(self) -> int:
        """Most memory that is held at once: while training, or at the check at the end."""
        training = sum(size for name, size in self.memory.items() if name != _CHECK)
        return max(training, self.memory["libraries, base and adapter"] + self.memory[_CHECK])

    def as_dict(self) -> dict[str, Any]:
        """Give the whole report in JSON types."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("out", "lint", "measured")},
            "peak_bytes": self.peak_bytes,
            "lint": self.lint.as_dict(),
            "measured": asdict(self.measured) if self.measured else None,
        }

    def text(self) -> str:
        """Give the report for a terminal."""
        lines = [self.lint.text(), ""]
        lines += [f"{name}: {value}" for name, value in self.setting.items()]
        lines.append(
            f"learning: {self.trainable_parameters:,} numbers, {self.steps} steps, {self.epochs:.1f} epochs"
        )
        lines += ["", f"memory: about {_bytes(self.peak_bytes)} at most"]
        lines += [f"  {name}: {_bytes(size)}" for name, size in self.memory.items()]
        lines += ["", f"disk: about {_bytes(sum(self.disk.values()))} in {self.out}"]
        lines += [f"  {name}: {_bytes(size)}" for name, size in self.disk.items() if size]
        counted = "measured steps" if self.measured else "estimated, on a machine that does nothing else"
        lines += ["", f"time: about {_duration(sum(self.seconds.values()))} ({counted})"]
        lines += [f"  {name}: {_duration(seconds)}" for name, seconds in self.seconds.items() if seconds]
        lines += [
            "",
            *self._measured_lines(),
            f"what the model will see and read: {self.out / 'contact_sheet.png'}",
        ]
        if self.errors:
            lines.append(f"training would stop at once: {len(self.errors)} errors in the data, see above")
        return "\n".join(lines)

    def _measured_lines(self) -> list[str]:
        if self.measured is None:
            return []
        lines = [
            f"measured: {seconds:.3g} s per micro-batch of {name}"
            for name, seconds in self.measured.seconds.items()
        ]
        lines.append(f"measured: {_bytes(self.measured.peak_bytes)} held at most")
        if self.measured.attention:
            times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in self.measured.attention.items())
            best = min(self.measured.attention, key=self.measured.attention.__getitem__)
            lines.append(f"measured: attention {times}; the fastest is --attention {best}")
        return lines


_CHECK = "checking the adapter in stock diffusers at the end"


def plan(
    source: Recipe | Mapping[str, Any] | str | Path,
    *,
    base: str | None = None,
    out: str | Path | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    measure: bool = False,
) -> PlanReport:
    """Look at data and cost of a run, and write plan.json and contact_sheet.png into its folder.

    One step of the largest bucket is gone through on tensors that have no memory, and its arithmetic, traffic and
    lifetimes are counted; the machine's speed is timed for a third of a second. With `measure`, one real step of
    each bucket is taken instead (its changes are thrown away), and attentions are compared.

    Args:
        source: a folder of images, a recipe file, settings, or a Recipe.
        base: pocket, a folder, a single file, or a hub name.
        out: folder for the report; the run's own without it.
        preset: settings to start from.
        overrides: dotted or nested settings, which win.
        measure: take real steps.

    Raises:
        ConfigError: a setting cannot be.
        DataError: there is no folder, or no image in it at all; anything less is in the report.
        BaseError: the base cannot be opened.
        MethodError: the method cannot be attached.
    """
    settings = {**(overrides or {}), **({"base.name": base} if base else {})}
    recipe = resolve(source, out=out, preset=preset, overrides=settings)
    looked = look(recipe)
    backbone, folder = looked.backbone, looked.images.folder
    buckets = [choose_bucket(record.size, looked.images.buckets) for record in folder.records]
    contact_sheet(folder, buckets, looked.images.captions(), recipe.out / "contact_sheet.png")

    task = None
    if measure and not looked.lint_report.errors:
        prepared = prepare(recipe, looked=looked)
        methods, task = prepared.methods, prepared.task
    else:
        methods, _ = attach(recipe, backbone, looked.components)
    parameters = [
        parameter
        for component, method in methods.items()
        for parameter in method.parameters(backbone.components[component]).values()
    ]
    held = _held_bytes(backbone.device)
    measured = _measure(recipe, backbone, task, parameters) if task else None
    largest = max(buckets, key=lambda bucket: bucket.width * bucket.height)
    encoding, latent_shape = _encoding(backbone, largest)
    step = _step_cost(recipe, looked, parameters, latent_shape)
    numbers = sum(parameter.numel() for parameter in parameters)
    report = PlanReport(
        out=recipe.out,
        lint=looked.lint_report,
        setting={
            "base": f"{backbone.title}, {backbone.parameter_count:,} parameters",
            "attention": backbone.attention,
            "computing in": str(backbone.compute_dtype).removeprefix("torch."),
        },
        trainable_parameters=numbers,
        steps=recipe.train.steps,
        epochs=round(recipe.train.steps / _steps_per_epoch(recipe, looked.lint_report), 2),
        memory=_memory(recipe, backbone, numbers, held, step),
        disk=_disk(recipe, looked, numbers, latent_shape),
        seconds=_seconds(recipe, looked, step, encoding, measured),
        measured=measured,
    )
    (recipe.out / "plan.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    return report


def _encoding(backbone: ImageBackbone, bucket: Bucket) -> tuple[Cost, tuple[int, ...]]:
    """Count the cost of encoding one picture; give the shape of its latent too."""
    shape: tuple[int, ...] = ()

    def encode() -> None:
        nonlocal shape
        mean, _ = backbone.encode_image(torch.zeros(1, 3, bucket.height, bucket.width))
        shape = tuple(mean.shape[1:])

    return count(encode), shape


def _step_cost(
    recipe: Recipe, looked: Looked, parameters: Sequence[Tensor], latent_shape: tuple[int, ...]
) -> Cost:
    """Count the forward and backward pass of one micro-batch."""
    backbone, rows = looked.backbone, _rows(recipe)
    text_learns = any(name.startswith("text_encoder") for name in looked.components)
    with torch.no_grad():
        example = backbone.encode_text([""])

    def step() -> None:
        noisy = torch.zeros(rows, *latent_shape, device=backbone.device)
        timesteps = torch.zeros(rows, dtype=torch.int64, device=backbone.device)
        conditioning = (
            backbone.encode_text([""] * rows)
            if text_learns
            else {name: tensor.new_zeros(rows, *tensor.shape[1:]) for name, tensor in example.items()}
        )
        loss = backbone.predict(noisy, timesteps, conditioning).square().sum()
        torch.autograd.grad(loss, list(parameters), allow_unused=True)

    return count(step)


def _steps_per_epoch(recipe: Recipe, lint: LintReport) -> int:
    """Count the steps that visit every image once, the prior's restyled drawings among them."""
    prior = getattr(recipe.objective, "prior", None)
    restyled = prior.pictures * prior.restyled if prior is not None else 0
    return sum(use.steps for use in lint.buckets) - (-restyled // recipe.train.step_size)


def _rows(recipe: Recipe) -> int:
    """Count what goes through the model at once: a micro-batch, and the prior's drawings beside it."""
    prior = getattr(recipe.objective, "prior", None)
    beside = int(recipe.train.batch_size * prior.share) if prior is not None and prior.pictures else 0
    return recipe.train.batch_size + beside


def _memory(recipe: Recipe, backbone: ImageBackbone, numbers: int, held: int, step: Cost) -> dict[str, int]:
    kept = _MOMENTS[recipe.train.optimizer] + (recipe.train.ema is not None)
    live = sum(_size(model, as_float32=False) for model in backbone.components.values())
    exact = sum(_size(model, as_float32=True) for model in backbone.components.values())
    return {
        "libraries, base and adapter": held,
        "gradients and activations of a step": int(WORKING_COPIES * step.peak_bytes),
        "optimiser and moving average": int(_FLOAT * numbers * kept),
        # a second base in float32, and the first one brought to float32 beside it
        _CHECK: _FLOAT * backbone.parameter_count + exact - live,
    }


def _disk(recipe: Recipe, looked: Looked, numbers: int, latent_shape: tuple[int, ...]) -> dict[str, int]:
    settings = looked.images.folder.settings
    latent = 2 * _FLOAT * torch.Size(latent_shape).numel() * (2 if settings.flip else 1)
    with torch.no_grad():
        text = sum(tensor.nbytes for tensor in looked.backbone.encode_text([""]).values())
    text_learns = any(name.startswith("text_encoder") for name in looked.components)
    kept = 1 + _MOMENTS[recipe.train.optimizer] + (recipe.train.ema is not None)
    adapters = 2 if recipe.validation.images else 1
    prior = getattr(recipe.objective, "prior", None)
    # Of each of its steps what the denoiser was given and what it said.
    drawn = (
        2
        * _FLOAT
        * torch.Size(latent_shape).numel()
        * _PRIOR_STEPS
        * (prior.pictures if prior is not None else 0)
    )
    return {
        "latents": 0 if settings.crop == "random" else latent * len(looked.images.folder.records),
        "text embeddings": 0 if text_learns else text * (looked.lint_report.captions.distinct + 1),
        "drawings of the prior": drawn,
        # One more than is kept, while it is written.
        "checkpoints": int(_FLOAT * numbers * kept * (recipe.train.keep_checkpoints + 1)),
        # Once in diffusers' names and once in PEFT's.
        "adapter": 2 * _FLOAT * numbers * adapters,
    }


def _seconds(
    recipe: Recipe, looked: Looked, step: Cost, encoding: Cost, measured: Measured | None
) -> dict[str, float]:
    backbone, train, settings = looked.backbone, recipe.train, looked.images.folder.settings
    exact = measure_speed(backbone.device, torch.float32)
    micro_batch = measure_speed(backbone.device, backbone.compute_dtype).seconds(step)
    # Without a backward pass, two rows for guidance.
    prior = getattr(recipe.objective, "prior", None)
    drawing = 2 * _PRIOR_STEPS * micro_batch / 3 / _rows(recipe)
    if measured is not None:
        micro_batch = sum(measured.seconds.values()) / len(measured.seconds)
    visits = train.steps * train.step_size
    encoded = (
        visits
        if settings.crop == "random"
        else len(looked.images.folder.records) * (2 if settings.flip else 1)
    )
    return {
        "encoding images": encoded * exact.seconds(encoding) / train.processes,
        "drawing the prior": prior.pictures * drawing / train.processes if prior is not None else 0.0,
        "training": train.steps * train.accumulate * micro_batch,
    }


def _measure(
    recipe: Recipe, backbone: ImageBackbone, task: TextToImage, parameters: Sequence[Tensor]
) -> Measured:
    """Take a step of each bucket twice, the first time to warm up, and throw the gradients away."""

    def step(bucket: Bucket) -> None:
        members = [index for index, group in enumerate(task.groups) if group == bucket]
        samples = list(enumerate(members[: recipe.train.batch_size]))
        loss, _ = task.loss(samples, step=0, epoch=0, step_size=recipe.train.step_size)
        torch.autograd.grad(loss, list(parameters), allow_unused=True)

    buckets = sorted(set(task.groups))
    seconds: dict[str, float] = {}
    for bucket in buckets:
        step(bucket)
        started = time.perf_counter()
        step(bucket)
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)
        seconds[str(bucket)] = time.perf_counter() - started
    peak = _peak_bytes(backbone.device)
    attention: dict[str, float] = {}
    if recipe.base.attention == "auto":
        commonest = max(buckets, key=list(task.groups).count)
        _, found = measure_attention(
            backbone.components, lambda: step(commonest), device=backbone.device, dtype=backbone.compute_dtype
        )
        attention = {str(name): each for name, each in found.items()}
    return Measured(seconds, peak, attention)


def _held_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    from mmpeft.trainers.training import peak_memory_bytes

    return peak_memory_bytes()


def _size(model: nn.Module, *, as_float32: bool) -> int:
    return sum(p.numel() * (_FLOAT if as_float32 else p.element_size()) for p in model.parameters())


def _bytes(size: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
