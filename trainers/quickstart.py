"""The first success: two adapters trained on the embedded base, mixed, fused, and measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft.backbones.base import ImageBackbone
from mmpeft.backbones.pocket import image_folder, judges_folder, pocket_folder
from mmpeft.bank import AdapterBank, attach
from mmpeft.config import BaseSettings, Recipe
from mmpeft.errors import ConfigError, TrainingError
from mmpeft.evaluation.judges import PocketJudges
from mmpeft.evaluation.style import Draw, StyleScores, score_style
from mmpeft.picture_grid import picture_grid
from mmpeft.trainers.preparation import prior_settings
from mmpeft.trainers.presets import resolve

STEPS, GUIDANCE = 20, 4.0
DRIFT_PROMPTS = 32


@dataclass(frozen=True)
class Run:
    """One training command, run in a process of its own so that its time and memory are those of a person's run."""

    images: str
    preset: str
    trigger: str
    settings: tuple[str, ...] = ()

    def recipe(self) -> Recipe:
        """Give the recipe that the command means, but for its own settings."""
        return resolve(image_folder(self.images) / "train", preset=self.preset)

    def start(self, out: Path) -> dict[str, Any]:
        """Train into a folder and give what the run measured, with the wall time of the whole process.

        Raises:
            TrainingError: the command failed; what it printed was shown.
        """
        shutil.rmtree(out, ignore_errors=True)
        folder = image_folder(self.images) / "train"
        command = ["train", str(folder), "--preset", self.preset, "--out", str(out)]
        command += ["--trigger", self.trigger, *self.settings]
        print("mmpeft", *command, flush=True)
        started = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", "mmpeft.cli", *command], check=False).returncode
        if code:
            raise TrainingError(f"training in {out} ended with exit code {code}; its last lines say why")
        measured: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
        return measured | {"train_seconds": round(time.perf_counter() - started, 1)}


STYLE = Run("high-contrast", "style", "on an ink background", ("--processes", "2", "--train.batch_size", "6"))
SECOND = Run("cat", "subject", "sks", ("--processes", "2", "--train.batch_size", "3", "--steps", "60"))


def quickstart(out: Path) -> str:
    """Train, mix, fuse, measure; write adapter/, before_after.png, mix.png and report.json, and say where to look.

    Raises:
        ConfigError: the folder holds something that no quickstart made.
        TrainingError: one of the trainings failed.
    """
    claim(out)
    style_run, second_run = STYLE.start(out / "style"), SECOND.start(out / "second")
    shutil.rmtree(out / "adapter", ignore_errors=True)
    shutil.copytree(out / "style" / "adapter", out / "adapter")
    backbone, draw = open_pocket()
    bank = attach(backbone.pipeline())
    bank.load(out / "style" / "adapter", name="style")
    bank.load(out / "second" / "adapter", name="second")
    scores = score(bank, draw, STYLE)
    with backbone.exactly():  # float32, so that a difference is the fusion's and not half precision's
        fusion = mix_and_fuse(bank, draw, out / "mix.png")
    rows = [scores.before[::4], scores.after[::4], scores.without_trigger[::4]]
    picture_grid(rows, row_labels=["before", "after", "no trigger"], cell=96).save(out / "before_after.png")
    report = {
        "train_seconds": style_run["train_seconds"],
        "steps": style_run["steps"],
        "images_per_second": style_run["images_per_second"],
        "peak_memory_bytes": style_run["peak_memory_bytes"],
        "trainable_parameters": style_run["trainable_parameters"],
        "base_parameters": style_run["base_parameters"],
        "adapter_bytes": (out / "adapter" / "pytorch_lora_weights.safetensors").stat().st_size,
        "base_bytes": sum(file.stat().st_size for file in pocket_folder().rglob("*") if file.is_file()),
        **scores.as_dict(),
        "judges": PocketJudges(judges_folder()).digests,
        **{key: style_run[key] for key in ("prior_seconds", "prior_share")},
        "second_adapter": {
            key: second_run[key] for key in ("train_seconds", "steps", "trainable_parameters")
        },
        **fusion,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return summary(report, out)


def claim(out: Path) -> None:
    """Mark a folder as the quickstart's own, which it may write anew.

    Raises:
        ConfigError: it holds something and bears no mark.
    """
    mark = out / ".quickstart"
    if out.exists() and not mark.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something else; give the quickstart a folder of its own with --out")
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def open_pocket() -> tuple[ImageBackbone, Draw]:
    """Open the embedded base, with a function that draws as the figures here are defined: 20 DDIM steps, guidance 4."""
    from mmpeft.backbones.stable_diffusion import StableDiffusion

    backbone = StableDiffusion.open(BaseSettings())

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Any]:
        return backbone.generate(prompts, seeds=seeds, steps=STEPS, guidance=GUIDANCE)

    return backbone, draw


def score(bank: AdapterBank, draw: Draw, run: Run, *, adapter: str = "style") -> StyleScores:
    """Score the style adapter of a run on the held-out concepts of its image folder.

    Drift is measured on concepts that were in no picture and in no prior prompt of the run.
    """
    judges = PocketJudges(judges_folder())
    held_out = captions(run.images, "held_out")
    seen = {*captions(run.images, "train"), *held_out, *prior_settings(run.recipe()).prompts}
    unseen = [concept for concept in judges.concepts if concept not in seen]
    return score_style(
        draw,
        lambda: bank.using({adapter: 1.0}),
        judges,
        style=run.images,
        concepts=held_out,
        trigger=run.trigger,
        drift_prompts=unseen[:: len(unseen) // DRIFT_PROMPTS][:DRIFT_PROMPTS],
    )


def captions(images: str, part: str) -> list[str]:
    """Read the captions of a bundled image folder, in the order of its pictures."""
    return [
        file.read_text(encoding="utf-8").strip()
        for file in sorted((image_folder(images) / part).glob("*.txt"))
    ]


def mix_and_fuse(bank: AdapterBank, draw: Draw, sheet: Path) -> dict[str, Any]:
    """Draw both adapters alone and together; fuse the mix, and measure what fusing and unfusing changed."""
    import numpy as np

    prompts, seeds = (
        [f"a {SECOND.trigger} cat, grinning, {STYLE.trigger}", f"rocket, {STYLE.trigger}"],
        [7, 7],
    )
    before = bank.weights_digest()
    rows = []
    mixes = (
        {"style": 0.0},
        {"style": 1.0},
        {"second": 1.0},
        {"style": 1.0, "second": 1.0},
        {"style": 0.5, "second": 1.0},
    )
    for weights in mixes:
        with bank.using(weights):
            rows.append(draw(prompts, seeds))
    bank.mix({"style": 1.0, "second": 1.0})
    live = rows[3]
    bank.fuse()
    fused = draw(prompts, seeds)
    bank.unfuse()
    difference = max(
        float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean() / 255)
        for one, other in zip(live, fused, strict=True)
    )
    labels = ["base", "style", "second", "both", "half style"]
    picture_grid([list(column) for column in zip(*rows, strict=True)], column_labels=labels).save(sheet)
    return {
        "mixed_pictures": len(rows) * len(prompts),
        "fused_minus_live": round(difference, 6),
        "unfuse_is_bit_exact": bank.weights_digest() == before,
    }


def summary(report: dict[str, Any], out: Path) -> str:
    """Say in a few lines what came out and where to look."""

    def with_interval(name: str) -> str:
        low, high = report[f"{name}_interval"]
        return f"{report[name]:.2f} ({low:.2f} to {high:.2f})"

    lines = [
        f"trained {report['steps']} steps in {report['train_seconds']:.0f} s, "
        f"{report['images_per_second']:.0f} images a second, "
        f"{report['trainable_parameters']:,} of {report['base_parameters']:,} parameters",
        f"style    {with_interval('style_before')} -> {with_interval('style_after')}",
        f"content  {with_interval('content_before')} -> {with_interval('content_after')}",
        f"bleed    {with_interval('bleed')}   drift {with_interval('drift')}",
        f"look at {out}/before_after.png and {out}/mix.png; figures in {out}/report.json; adapter in {out}/adapter",
    ]
    return "\n".join(lines)
