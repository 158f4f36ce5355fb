"""What a run says while it runs: a progress bar, metrics.jsonl, TensorBoard or W&B."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mmpeft.errors import MissingDependency

METRICS = "metrics.jsonl"
# Without a terminal a run says how far it is this many times.
_LINES = 10


class Tracking:
    """The voice of a run. A process that is not the first has none: every method of a silent one does nothing.

    Args:
        out: folder of the run.
        tracker: where the curves go besides out/metrics.jsonl.
        steps: of the whole run.
        step: that the run stands at; lines of later steps in metrics.jsonl are of a course that was left, and go.
        silent: say and write nothing.

    Raises:
        MissingDependency: the tracker is not installed.
    """

    def __init__(
        self,
        out: Path,
        tracker: Literal["none", "tensorboard", "wandb"],
        *,
        steps: int,
        step: int,
        silent: bool,
    ) -> None:
        self._silent = silent
        self._steps = steps
        self._trackers: list[Any] = []
        if silent:
            return
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

        self._metrics = out / METRICS
        _truncate(self._metrics, step)
        if tracker != "none":
            self._trackers.append(_start(tracker, out, step))
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=not terminal, dynamic_ncols=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Note a step that was taken, counted from 1; `values` has at least loss and images_per_second."""
        if self._silent:
            return
        self._append(step, values)
        shown = f"loss {values['loss']:.4f}, {values['images_per_second']:.1f} images/s"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        if self._bar.disable and step * _LINES // self._steps > (step - 1) * _LINES // self._steps:
            self.say(f"step {step} of {self._steps}: {shown}")

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Note what was measured after a step, such as the validation loss."""
        if not self._silent:
            self._append(step, values)
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def pictures(self, step: int, folder: Path) -> None:
        """Send the pictures of a folder to the tracker."""
        for path in sorted(folder.glob("*.png")) if self._trackers else ():
            import numpy as np
            from PIL import Image

            pixels = np.asarray(Image.open(path).convert("RGB"))[None]  # (1, H, W, 3), 0..255
            for tracker in self._trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"preview/{path.stem}": pixels}, step=step, **layout)

    def say(self, text: str) -> None:
        """Say a sentence on the standard error stream, above the progress bar."""
        if not self._silent:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the bar and the tracker."""
        if not self._silent:
            self._bar.close()
        for tracker in self._trackers:
            tracker.finish()

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # the last line of a process that died while writing it
            continue
    aside = path.with_name(f".{path.name}")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


def _start(tracker: Literal["tensorboard", "wandb"], out: Path, step: int) -> Any:
    from accelerate import tracking

    try:
        if tracker == "tensorboard":
            # TensorBoard then hides what a killed run had logged beyond its checkpoint.
            started = tracking.TensorBoardTracker("tensorboard", out, purge_step=step + 1)
        else:
            started = tracking.WandBTracker("mmpeft", dir=str(out))
        started.start()
    except ImportError as error:
        raise MissingDependency(
            tracker, f"train.tracker = {tracker}", f"pip install 'mmpeft[{tracker}]'"
        ) from error
    return started
