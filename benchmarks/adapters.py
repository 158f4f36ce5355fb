"""Train and score styles and a subject on the embedded base; the README's table comes from here.

    python benchmarks/adapters.py      # about fifteen minutes; writes runs/adapters/: a table, results.json, pictures

Each is trained by the command that it prints, in a process of its own. Styles are scored as in the quickstart. The
subject's held-out expressions are scored like content: how often the concept judge calls the picture what it calls
most of the real ones, a cat face; and how often the style judge sees the style in which the real ones are drawn. With
three captions, its intervals are over pictures.
"""

import json
from pathlib import Path

from mmpeft.backbones.pocket import judges_folder
from mmpeft.bank import attach
from mmpeft.evaluation.bootstrap import interval
from mmpeft.evaluation.judges import PocketJudges
from mmpeft.picture_grid import picture_grid
from mmpeft.trainers import quickstart
from mmpeft.trainers.quickstart import STYLE, Run, captions, open_pocket, score

OUT = Path("runs/adapters")
STYLES = (
    STYLE,
    Run("fluent-3d", "style", "on a clay background", STYLE.settings),
    Run("fluent-flat", "style", "on a felt background", STYLE.settings),
)
SUBJECT = Run("cat", "subject", "sks", quickstart.SECOND.settings[:4])
CAT, CAT_STYLE = "cat face", "fluent-3d"


def style(run: Run) -> dict:
    out = OUT / run.images
    measured = run.start(out)
    backbone, draw = open_pocket()
    bank = attach(backbone.pipeline())
    bank.load(out / "adapter", name="style")
    scores = score(bank, draw, run)
    rows = [scores.before[::4], scores.after[::4], scores.without_trigger[::4]]
    picture_grid(rows, row_labels=["before", "after", "no trigger"], cell=96).save(OUT / f"{run.images}.png")
    return {"train_seconds": measured["train_seconds"], "steps": measured["steps"], **scores.as_dict()}


def subject(run: Run) -> dict:
    out = OUT / run.images
    measured = run.start(out)
    backbone, draw = open_pocket()
    bank = attach(backbone.pipeline())
    bank.load(out / "adapter", name="subject")
    judges = PocketJudges(judges_folder())
    prompts = [caption for caption in captions(run.images, "held_out") for _ in range(8)]
    seeds = list(range(len(prompts)))
    before = draw(prompts, seeds)
    with bank.using(subject=1.0):
        after = draw(prompts, seeds)
    picture_grid([before[::2], after[::2]], row_labels=["before", "after"], cell=96).save(
        OUT / f"{run.images}.png"
    )
    result = {
        "train_seconds": measured["train_seconds"],
        "steps": measured["steps"],
        "pictures": len(prompts),
    }
    for name, pictures in (("before", before), ("after", after)):
        for score_name, hits in (
            ("content", judges.content_is(pictures, [CAT] * len(pictures))),
            ("style", judges.style_is(pictures, CAT_STYLE)),
        ):
            result[f"{score_name}_{name}"] = round(sum(hits) / len(hits), 4)
            result[f"{score_name}_{name}_interval"] = interval(hits)
    return result


def row(name: str, result: dict) -> str:
    def cell(key: str) -> str:
        if key not in result:
            return "-"
        low, high = result[f"{key}_interval"]
        return f"{result[key]:.2f} ({low:.2f}-{high:.2f})"

    columns = ("style_before", "style_after", "content_before", "content_after", "bleed", "drift")
    return f"| {name} | {result['train_seconds']:.0f} | " + " | ".join(map(cell, columns)) + " |"


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    results = {run.images: style(run) for run in STYLES}
    results[SUBJECT.images] = subject(SUBJECT)
    (OUT / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    head = ["adapter", "seconds", "style before", "after", "content before", "after", "bleed", "drift"]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    table += [row(name, result) for name, result in results.items()]
    (OUT / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
