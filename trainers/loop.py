"""The training loop, one for all backbones: plan a step, add up its gradient, take it, look, save.

Whatever happens at a step is a function of the recipe, the step and the parameters, so that a run that was killed and
resumed ends byte for byte like one that was not, on the same machine with the same number of threads.
"""

import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmpeft import randomness
from mmpeft.config import TrainSettings
from mmpeft.data.batches import StepBatch, share, step_batch
from mmpeft.errors import ConfigError, DataError, TrainingError
from mmpeft.trainers import checkpoint, learning_rate, optimizers
from mmpeft.trainers.ema import MovingAverage
from mmpeft.trainers.gradients import StepGradient, StepTotal
from mmpeft.trainers.launch import accelerator as open_accelerator
from mmpeft.trainers.recipe_changes import changes, require_resumable
from mmpeft.trainers.stopping import StopRequest
from mmpeft.trainers.task import ParameterGroup as ParameterGroup
from mmpeft.trainers.task import Task
from mmpeft.trainers.tracking import Tracking

if TYPE_CHECKING:
    from accelerate import Accelerator

# Share that a step has in the running mean of the training loss, once 50 steps are in it.
_LOSS_SMOOTHING = 0.02
# Looks in a row at which the validation loss rose while the training loss fell, before that is called overfitting.
_OVERFIT_LOOKS = 3
# File names of a batch that fit into an error.
_NAMES_SHOWN = 16


@dataclass(frozen=True)
class Progress:
    """What a run has learned about itself; saved with each checkpoint."""

    step: int = 0
    train_loss: float | None = None
    """running mean"""
    validation_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    last_look: tuple[float, float] | None = None
    """(validation, training) loss at the last look"""
    rising_looks: int = 0
    """looks in a row at which validation rose and training fell"""
    seconds: float = 0.0
    """in steps, over all sessions of the run"""
    samples: int = 0

    def metrics(self) -> dict[str, float]:
        """Give the figures that belong on the adapter's card: those that an interruption does not change."""
        named = {
            name: getattr(self, name) for name in ("train_loss", "validation_loss", "best_loss", "best_step")
        }
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class LoopResult:
    """How a run ended."""

    steps: int
    """optimiser steps taken, over all sessions"""
    seconds: float
    """in steps: without validation, previews and saving"""
    samples: int
    """seen, repeats included"""
    final_loss: float | None
    """running mean of the training loss over about the last 50 steps"""
    validation_loss: float | None
    best_step: int | None
    best_loss: float | None
    stopped_early: bool
    stopped_by: int | None
    """the signal that stopped it early; the command line exits with 128 + its number"""


def train(
    task: Task,
    settings: TrainSettings,
    *,
    seed: int,
    out: Path,
    recipe: Mapping[str, Any],
    validate_every: int | None = None,
    preview_every: int | None = None,
    resume: bool | Path = False,
    accelerator: "Accelerator | None" = None,
) -> LoopResult:
    """Train until the last step, or until SIGTERM or Ctrl-C, and write out/adapter (and out/best with validation).

    Args:
        out: folder of the run: adapter/, best/, checkpoints/, previews/, metrics.jsonl.
        recipe: dotted, in JSON values; kept with the checkpoints, to tell what changed on resume.
        validate_every: steps between looks at the validation loss; the last step is one too. None never looks.
        preview_every: steps between previews; none draws them at the first and the last step only.
        resume: go on from the newest checkpoint that verifies, or begin where there is none; or from the one at a path.
        accelerator: of the caller; without it one is opened for `settings.processes`.

    Raises:
        ConfigError: a changed recipe that makes another run, a folder with another run in it, or another number of
            processes than the recipe's.
        TrainingError: a loss or gradient that is not finite, or a full disk; the last checkpoint stands.
        MissingDependency: the optimiser or tracker is not installed.
    """
    if accelerator is None:
        accelerator = open_accelerator(settings.processes)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    first = accelerator.is_main_process
    size = sum(
        p.numel() * p.element_size() for group in task.parameter_groups for p in group.parameters.values()
    )
    with (
        checkpoint.claim(out) if first else nullcontext(),
        checkpoint.clear_disk_errors(out / "checkpoints", size),
        StopRequest(silent=not first) as stop,
    ):
        loop = _Loop(task, settings, seed, out, recipe, validate_every, preview_every, accelerator, stop)
        try:
            loop.begin(resume)
            loop.run()
        finally:
            loop.close()
        # A process that ends takes its side of every connection with it, so none leaves before the first has saved.
        accelerator.wait_for_everyone()
    progress = loop.progress
    early = progress.step < settings.steps
    return LoopResult(
        steps=progress.step,
        seconds=progress.seconds,
        samples=progress.samples,
        final_loss=progress.train_loss,
        validation_loss=progress.validation_loss,
        best_step=progress.best_step,
        best_loss=progress.best_loss,
        stopped_early=early,
        # Another process may have been the one that got the signal.
        stopped_by=(stop.number or int(signal.SIGTERM)) if early else None,
    )


class _Loop:
    """One session of a run."""

    def __init__(
        self,
        task: Task,
        settings: TrainSettings,
        seed: int,
        out: Path,
        recipe: Mapping[str, Any],
        validate_every: int | None,
        preview_every: int | None,
        accelerator: "Accelerator",
        stop: StopRequest,
    ) -> None:
        if accelerator.num_processes != settings.processes:
            raise ConfigError(
                f"train.processes: the recipe asks for {settings.processes}, {accelerator.num_processes} are running; "
                f"start the run with mmpeft train --processes {settings.processes}"
            )
        if not task.groups:
            raise DataError("there is no sample to train on")
        groups = task.parameter_groups
        if not any(group.learns_at(settings.steps - 1, settings.steps) for group in groups):
            raise ConfigError(
                "components.*.stop_after: all components stop learning early; lower train.steps instead"
            )
        self.task, self.settings, self.seed, self.out = task, settings, seed, out
        self.recipe, self.stop, self.accelerator = recipe, stop, accelerator
        self.validate_every, self.preview_every = validate_every, preview_every
        self.step_size = settings.batch_size * settings.accumulate * settings.processes
        self.parameters = {f"{g.name}.{name}": p for g in groups for name, p in g.parameters.items()}
        self.gradient = StepGradient(groups, accelerator, task.loss_scale)
        self.optimizer = optimizers.build(settings, groups)
        self.average: MovingAverage | None = None
        self.progress = Progress()
        self.tracking: Tracking | None = None

    def begin(self, resume: bool | Path) -> None:
        """Start from the parameters as they are, or from a checkpoint."""
        first = self.accelerator.is_main_process
        folder = self.out / "checkpoints"
        if first:
            checkpoint.clean(self.out)
            checkpoint.clean(folder)
        path, skipped = (resume, []) if isinstance(resume, Path) else checkpoint.newest(folder)
        if path is not None and resume is False:
            raise ConfigError(f"{self.out} has checkpoints of another run; resume it, or choose another out")
        said = [f"passed over checkpoint {fault}" for fault in skipped]
        if path is not None:
            said += [*self._restore(checkpoint.read(path)), f"resumed from {path.name}"]
        if self.accelerator.num_processes > 1:
            self._share_parameters()
        if self.settings.ema is not None and self.average is None:
            self.average = MovingAverage(self.parameters, self.settings.ema)
        self.tracking = Tracking(
            self.out,
            self.settings.tracker,
            steps=self.settings.steps,
            step=self.progress.step,
            silent=not first,
        )
        if self.settings.optimizer == "prodigy" and self.settings.learning_rate < 0.1:
            said.append(
                f"train.learning_rate is {self.settings.learning_rate:g}: Prodigy multiplies its own estimate with it "
                "and is meant to run at 1"
            )
        for sentence in said:
            self.tracking.say(sentence)

    def run(self) -> None:
        """Take the steps that are left, and write adapter/."""
        steps, stopped = self.settings.steps, False
        if self.progress.step == 0:
            self._preview()
        while self.progress.step < steps and not stopped:
            stopped = self._take_step(self.progress.step)
            last = self.progress.step == steps
            if self.validate_every and (last or self.progress.step % self.validate_every == 0):
                self._validate()
            if last or (self.preview_every and self.progress.step % self.preview_every == 0):
                self._preview()
            if last or stopped or self.progress.step % self.settings.checkpoint_every == 0:
                self._save_checkpoint()
        self._save("adapter")
        if self.average is not None:
            self.average.settle()

    def close(self) -> None:
        """Leave parameters without gradients, and the tracker ended."""
        self.gradient.release()
        if self.tracking is not None:
            self.tracking.close()

    def _take_step(self, step: int) -> bool:
        """Take one optimiser step; say whether the run is asked to stop after it."""
        settings, rank = self.settings, self.accelerator.process_index
        began = time.perf_counter()
        batch = step_batch(self.task.groups, self.step_size, self.seed, step)
        self.gradient.open([g for g in self.task.parameter_groups if g.learns_at(step, settings.steps)])

        faulty: list[int] = []
        for k, samples in enumerate(share(batch, settings.batch_size, self.accelerator.num_processes, rank)):
            # Dropout draws from the global generators: seeded here, it is a function of the place in the run.
            randomness.reseed_globals(self.seed, "micro", step, rank, k)
            loss, count = self.task.loss(samples, step=step, epoch=batch.epoch, step_size=self.step_size)
            if not math.isfinite(loss.item()):
                faulty += [index for _, index in samples]
            self.gradient.add(loss, count)
        total = self.gradient.close(stop=self.stop.requested)
        self._require_finite(step, batch, total, faulty)
        self.gradient.clip(total.gradient_norm, settings.max_grad_norm)

        rates = self._set_learning_rates(step)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(step)
        self._note_step(total, len(batch.indices), rates, time.perf_counter() - began)
        return total.stop

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        settings, rates = self.settings, {}
        factor = learning_rate.factor(
            settings.schedule, step, steps=settings.steps, warmup_steps=settings.warmup_steps
        )
        for group, slot in zip(self.task.parameter_groups, self.optimizer.param_groups, strict=True):
            # What stopped has no gradient and is passed over; 0 also keeps it out of Prodigy's common rate.
            learns = group.learns_at(step, settings.steps)
            slot["lr"] = rates[group.name] = group.learning_rate * factor if learns else 0.0
        return rates

    def _require_finite(self, step: int, batch: StepBatch, total: StepTotal, faulty: Sequence[int]) -> None:
        if math.isfinite(total.loss) and math.isfinite(total.gradient_norm) and total.count > 0:
            return
        names = self.task.sample_names(list(faulty or batch.indices))
        shown = ", ".join(names[:_NAMES_SHOWN]) + (
            f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN)
        )
        if total.count <= 0:
            raise DataError(f"step {step + 1} has nothing to learn from in {shown}; look at these samples")
        what = (
            f"loss is {total.loss:g}"
            if not math.isfinite(total.loss)
            else f"gradient norm is {total.gradient_norm:g}"
        )
        rate = max(self._set_learning_rates(step).values())
        path = checkpoint.newest(self.out / "checkpoints").path
        raise TrainingError(
            f"{what} at step {step + 1} (learning_rate {rate:g}), on {shown}; nothing was saved over: "
            f"{f'checkpoint {path.name} stands' if path else 'no checkpoint was written yet'}. Try "
            f"--train.learning_rate {self.settings.learning_rate / 10:g}, --base.precision fp32, or look at these files"
        )

    def _note_step(self, total: StepTotal, samples: int, rates: Mapping[str, float], seconds: float) -> None:
        before = self.progress
        share_of_step = max(1 / (before.step + 1), _LOSS_SMOOTHING)
        mean = total.loss if before.train_loss is None else before.train_loss
        self.progress = replace(
            before,
            step=before.step + 1,
            train_loss=mean + share_of_step * (total.loss - mean),
            seconds=before.seconds + seconds,
            samples=before.samples + samples,
        )
        self._voice.step(
            self.progress.step,
            {
                "loss": total.loss,
                "gradient_norm": total.gradient_norm,
                "images_per_second": samples / seconds,
                **{f"learning_rate/{name}": rate for name, rate in rates.items()},
            },
        )

    def _validate(self) -> None:
        """Look at the validation loss; keep the adapter as best/ if it is the lowest so far."""
        if not self.accelerator.is_main_process:
            return
        with self._as_saved():
            loss = self.task.validate()
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingError(
                f"validation loss is {loss:g} after step {self.progress.step}, while the training loss was finite; "
                "look at the held-out images, or try --base.precision fp32"
            )
        before = self.progress
        train_loss = before.train_loss if before.train_loss is not None else math.nan
        parted = (
            before.last_look is not None and loss > before.last_look[0] and train_loss < before.last_look[1]
        )
        rising = before.rising_looks + 1 if parted else 0
        self.progress = replace(
            before, validation_loss=loss, last_look=(loss, train_loss), rising_looks=rising
        )
        self._voice.note(before.step, {"validation_loss": loss, "train_loss": train_loss})
        if before.best_loss is None or loss < before.best_loss:
            self.progress = replace(self.progress, best_loss=loss, best_step=before.step)
            self._save("best")
        if rising == _OVERFIT_LOOKS:
            self._voice.say(
                f"overfitting: the validation loss rose at the last {rising} looks while the training loss fell; best/ "
                f"is step {self.progress.best_step}. Fewer steps, a lower rank or more images would help"
            )

    def _preview(self) -> None:
        if self.accelerator.is_main_process:
            folder = self.out / "previews" / f"step-{self.progress.step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            with self._as_saved():
                self.task.preview(self.progress.step, folder)
            self._voice.pictures(self.progress.step, folder)
            if not any(folder.iterdir()):  # a task without prompts draws nothing
                folder.rmdir()

    def _save(self, name: str) -> None:
        if self.accelerator.is_main_process:
            with self._as_saved():
                checkpoint.replace_folder(
                    self.out / name,
                    lambda folder: self.task.save(
                        folder, step=self.progress.step, metrics=self.progress.metrics()
                    ),
                )

    def _save_checkpoint(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state, scalars = optimizers.state_of(self.optimizer, list(self.parameters))
        tensors = {"parameters": _on_disk(self.parameters), "optimizer": state}
        if self.average is not None:
            tensors["ema"] = _on_disk(self.average.averages)
        rest = {
            "progress": asdict(self.progress),
            "optimizer": scalars,
            "recipe": dict(self.recipe),
            "samples": self._sample_digest(),
            "machine": self._machine(),
        }
        made = checkpoint.Checkpoint(self.progress.step, tensors, rest)
        checkpoint.write(self.out / "checkpoints", made, self.settings.keep_checkpoints)

    def _restore(self, saved: checkpoint.Checkpoint) -> list[str]:
        """Take a checkpoint's state over; give what is to be said about it."""
        found = changes(saved.state["recipe"], self.recipe)
        require_resumable(found)
        if saved.state["samples"] != self._sample_digest():
            raise ConfigError(
                "the training samples or their buckets are not those that the checkpoint was made with; put the images "
                "back, or begin a new run in another out"
            )
        if saved.step > self.settings.steps:
            raise ConfigError(
                f"train.steps: {self.settings.steps}, but the checkpoint stands at step {saved.step}"
            )
        _fill(self.parameters, saved.tensors["parameters"])
        optimizers.restore(
            self.optimizer, list(self.parameters), saved.tensors["optimizer"], saved.state["optimizer"]
        )
        if self.settings.ema is not None:
            self.average = MovingAverage(self.parameters, self.settings.ema)
            _fill(self.average.averages, saved.tensors["ema"])
        progress = dict(saved.state["progress"])
        progress["last_look"] = tuple(progress["last_look"]) if progress["last_look"] else None
        self.progress = Progress(**progress)
        machine = changes(saved.state["machine"], self._machine())
        return [f"changed since the checkpoint: {change}" for change in found] + [
            f"not as when the checkpoint was made, so the result may differ in rounding: {c.key}: {c.old} -> {c.new}"
            for c in machine
        ]

    def _share_parameters(self) -> None:
        from accelerate.utils import broadcast

        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.copy_(broadcast(parameter.detach().contiguous(), from_process=0))

    def _as_saved(self) -> AbstractContextManager[None]:
        return self.average.in_place() if self.average is not None else nullcontext()

    def _sample_digest(self) -> str:
        return blake2b(repr(list(self.task.groups)).encode(), digest_size=16).hexdigest()

    def _machine(self) -> dict[str, Any]:
        return {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": self.accelerator.device.type,
            "processes": self.accelerator.num_processes,
        }

    @property
    def _voice(self) -> Tracking:
        if self.tracking is None:
            raise RuntimeError("begin() comes before run()")
        return self.tracking


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in side.items()} for side in (targets, values)]
    if shapes[0] != shapes[1]:
        names = sorted(name for name in {*targets, *values} if shapes[0].get(name) != shapes[1].get(name))
        raise TrainingError(
            f"the checkpoint has other parameters than this run: {len(names)} differ, the first is {names[0]} "
            f"({shapes[1].get(names[0])} saved, {shapes[0].get(names[0])} here)"
        )
    for name, target in targets.items():
        target.copy_(values[name])


def _on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
