"""Compose two styles and a subject by every strategy on the embedded base; the README's table and grid come from here.

    python benchmarks/compositions.py      # about twelve minutes, half of them for the training

Trains what is not yet in runs/compositions/ by the commands that it prints. Each composition is asked for what each
parent learned, on captions that no adapter saw:

- kept: how near its pictures are to the parent's own, 1 - mean distance to the parent's picture / mean distance of the
  base's to it; 1 is the parent alone, 0 no nearer than the base, less is something else.
- style, subject: the share of pictures in which a judge sees the style, or names the subject rightly.
- drift: how far pictures that ask for nothing moved, 1 being as far as another concept.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from readme_table import place

import mmpeft
from mmpeft.adapter import Adapter
from mmpeft.backbones.pocket import judges_folder
from mmpeft.bank import AdapterBank, attach
from mmpeft.composition.report import CompositionReport
from mmpeft.evaluation.drift import drift
from mmpeft.evaluation.judges import PocketJudges
from mmpeft.evaluation.style import Draw
from mmpeft.picture_grid import picture_grid
from mmpeft.plugins import names
from mmpeft.trainers.quickstart import SECOND, STYLE, Run, captions, open_pocket

OUT = Path("runs/compositions")
RESULTS = Path(__file__).parent / "results"
FLAT = Run("fluent-flat", "style", "on a felt background", STYLE.settings)
SUBJECT = Run("cat", "subject", SECOND.trigger, SECOND.settings[:4])
PARENTS = {"ink": STYLE, "felt": FLAT, "cat": SUBJECT}
WEIGHTS = {"ink": 1.0, "felt": 1.0, "cat": 1.0}
RANK = 16
CAT = "cat face"
EXAMPLES = (
    "rocket, {ink}",
    "rocket, {felt}",
    "a {cat} cat, grinning",
    "a {cat} cat, grinning, {ink}",
    "rocket",
)


@dataclass(frozen=True)
class Question:
    """Prompts that ask for what one parent learned, and what a judge should see in the pictures."""

    prompts: list[str]
    is_there: Callable[[list[Image.Image]], list[bool]]


def questions(judges: PocketJudges) -> dict[str, Question]:
    """Give the question of each parent, and one that asks for the subject in a style."""
    cats = captions(SUBJECT.images, "held_out") * 8

    def in_style(run: Run) -> Question:
        prompts = [f"{concept}, {run.trigger}" for concept in captions(run.images, "held_out") * 2]
        return Question(prompts, lambda pictures: judges.style_is(pictures, run.images))

    return {
        "ink": in_style(STYLE),
        "felt": in_style(FLAT),
        "cat": Question(cats, lambda pictures: judges.content_is(pictures, [CAT] * len(pictures))),
        "cat in ink": Question(
            [f"{cat}, {STYLE.trigger}" for cat in cats],
            lambda pictures: judges.style_is(pictures, STYLE.images),
        ),
    }


def trained() -> dict[str, Adapter]:
    for name, run in PARENTS.items():
        if not (OUT / name / "adapter").is_dir():
            run.start(OUT / name)
    return {name: mmpeft.load_adapter(OUT / name / "adapter") for name in PARENTS}


class Examiner:
    """Draws with a mix and compares with what the base and the parents alone drew."""

    def __init__(self, bank: AdapterBank, draw: Draw, judges: PocketJudges) -> None:
        self._bank, self._draw, self._questions = bank, draw, questions(judges)
        seen = {
            caption
            for run in PARENTS.values()
            for part in ("train", "held_out")
            for caption in captions(run.images, part)
        }
        self._unseen = [concept for concept in judges.concepts if concept not in seen][::8][:24]
        self._undisturbed = self._pictures({}, self._unseen)
        self._base = {name: self._pictures({}, each.prompts) for name, each in self._questions.items()}
        self._parents = {name: self._pictures({name: 1.0}, self._questions[name].prompts) for name in PARENTS}

    def scores(self, mix: dict[str, float]) -> dict[str, float]:
        """Ask a mix every question."""
        found: dict[str, float] = {}
        for name, question in self._questions.items():
            pictures = self._pictures(mix, question.prompts)
            hits = question.is_there(pictures)
            found[name] = round(sum(hits) / len(hits), 4)
            if name in self._parents:
                parent = self._parents[name]
                found[f"{name} kept"] = round(
                    1 - distance(pictures, parent) / distance(self._base[name], parent), 4
                )
        found["drift"] = drift(self._pictures(mix, self._unseen), self._undisturbed)[0]
        return found

    def _pictures(self, mix: dict[str, float], prompts: list[str]) -> list[Image.Image]:
        with self._bank.using(mix):
            return self._draw(prompts, list(range(len(prompts))))


def distance(pictures: list[Image.Image], others: list[Image.Image]) -> float:
    """Give the mean Euclidean distance of pictures' 8-bit values, pair by pair."""
    pairs = [
        (np.asarray(one, float), np.asarray(other, float))
        for one, other in zip(pictures, others, strict=True)
    ]
    return float(np.mean([np.linalg.norm(one - other) for one, other in pairs]))


def composed(adapters: dict[str, Adapter]) -> tuple[dict[str, Adapter], dict[str, dict]]:
    """Compose by every strategy: svd at the rank of one parent, and what is not low-rank at that rank too."""
    weighted = [(adapters[name], WEIGHTS[name]) for name in PARENTS]
    made, reports = {}, {}

    def keep(label: str, adapter: Adapter, report: CompositionReport) -> None:
        made[label] = adapter
        reports[label] = {"error": round(float(report.error), 4), "seconds": round(report.seconds, 2)}

    for strategy in names("strategy"):
        adapter, report = mmpeft.compose(weighted, strategy, rank=RANK if strategy == "svd" else None)
        keep(strategy, adapter, report)
        if None in report.ranks.values():  # not low-rank: also as what LoRA can hold of it
            keep(f"{strategy}, rank {RANK}", *mmpeft.compose(weighted, strategy, rank=RANK))
    return made, reports


def table(results: dict[str, dict]) -> str:
    """Write the README's table."""
    columns = ("ink", "ink kept", "felt kept", "cat", "cat kept", "cat in ink", "drift")
    heads = (
        "mix",
        "ink style",
        "kept",
        "felt kept",
        "cat named",
        "kept",
        "cat in ink style",
        "drift",
        "rank 16 loses",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for label, scores in results.items():
        error = scores.get("error")
        lost = "-" if not error else f"{error:.0%}"
        lines.append(f"| {label} | " + " | ".join(f"{scores[name]:.2f}" for name in columns) + f" | {lost} |")
    return "\n".join(lines)


def main() -> None:
    adapters = trained()
    made, reports = composed(adapters)
    backbone, draw = open_pocket()
    judges = PocketJudges(judges_folder())
    bank = attach(backbone.pipeline())
    for name, adapter in adapters.items():
        bank.load(adapter, name)
    examiner = Examiner(bank, draw, judges)
    rows, labels, results = [], [], {}

    def look(label: str, mix: dict[str, float]) -> None:
        results[label] = examiner.scores(mix) | reports.get(label, {})
        triggers = {name: run.trigger for name, run in PARENTS.items()}
        with bank.using(mix):
            rows.append(draw([example.format(**triggers) for example in EXAMPLES], [7] * len(EXAMPLES)))
        labels.append(label)
        print(label, results[label], flush=True)

    look("base", {})
    for name in PARENTS:
        look(f"{name} alone", {name: 1.0})
    look("live sum", WEIGHTS)
    for label, adapter in made.items():
        bank.load(adapter, label)
        look(label, {label: 1.0})
        bank.unload(label)
    report = mmpeft.interference(adapters)
    RESULTS.mkdir(exist_ok=True)
    sheet: Image.Image = picture_grid(
        rows,
        row_labels=labels,
        column_labels=[e.format(ink="ink", felt="felt", cat="sks") for e in EXAMPLES],
        cell=96,
    )
    sheet.save(RESULTS / "compositions.png")
    report.picture().save(RESULTS / "interference.png")
    (RESULTS / "compositions.json").write_text(
        json.dumps({"scores": results, "interference": report.as_dict()}, indent=2) + "\n"
    )
    place("bench-compositions", table(results))
    print(report.text())


if __name__ == "__main__":
    main()
