"""A training run from the recipe to the verified adapter."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpeft.config import Recipe
from mmpeft.errors import ConfigError
from mmpeft.trainers import artefact, launch, loop
from mmpeft.trainers.preparation import look, prepare, prior_settings
from mmpeft.trainers.presets import resolve

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    adapter_dir: Path
    metrics: Mapping[str, Any]
    steps: int
    seconds: float
    """from the start of the process to the verified adapter"""
    verified: bool | None
    """whether stock diffusers, loading the folder, computes what was trained; None where it was not looked at: after an
    early stop, and in all processes but the first"""
    verification: str
    stopped_by: int | None = None
    """number of the signal that ended the run early, after a checkpoint"""

    def text(self) -> str:
        """Say it for the terminal."""
        if self.stopped_by:
            return f"stopped after step {self.steps}; a checkpoint is written: go on with --resume"
        return f"{self.steps} steps in {self.seconds:.0f} s\n{self.verification}\nthe adapter is in {self.adapter_dir}"


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
    looked = look(recipe)
    if accelerator.is_main_process:
        print(looked.lint_report.text(), flush=True)
        backbone, drawings = looked.backbone, prior_settings(recipe).pictures
        print(f"attention: {backbone.attention}; computing in {backbone.compute_dtype}", flush=True)
        if drawings:
            print(
                f"the base draws up to {drawings} pictures of its own first, which stay as they are",
                flush=True,
            )
    prepared = prepare(recipe, accelerator, looked)
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
    peak = summed_over_processes(peak_memory_bytes(), accelerator)
    adapter_dir = recipe.out / "adapter"
    if outcome.stopped_by or not accelerator.is_main_process:
        return TrainResult(adapter_dir, {}, outcome.steps, run_seconds(), None, "", outcome.stopped_by)
    report = artefact.finish(
        prepared.backbone, adapter_dir, captions=prepared.task.some_captions(2), preview=recipe.preview
    )
    metrics = {
        "steps": outcome.steps,
        "loop_seconds": round(outcome.seconds, 2),
        "images_per_second": round(outcome.samples / outcome.seconds, 2) if outcome.seconds else None,
        "prior_seconds": round(prepared.prior_seconds, 2),
        "prior_share": prepared.task.prior_share,
        "train_seconds": round(run_seconds(), 2),
        "peak_memory_bytes": peak,
        "peak_memory_bytes_with_verification": peak_memory_bytes(),
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


def run_seconds() -> float:
    """Give the seconds since this process started."""
    import psutil

    return time.time() - float(psutil.Process().create_time())


def peak_memory_bytes() -> int:
    """Give the most memory that this process ever held, bytes."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024


def summed_over_processes(number: int, accelerator: Accelerator) -> int:
    """Add a number up over the processes of a run, exactly."""
    import torch

    total = accelerator.reduce(torch.tensor(number, dtype=torch.float64, device=accelerator.device), "sum")
    return int(total.item())
