"""A training process for the tests: `python train_child.py '<json>'` trains a tiny task as the JSON says.

With "sessions": [{...}, ...] it runs one session after another, each as the JSON with these changes says, and prints
their exit codes. With "chains": {folder: [n, ...]} it trains into each folder of `out` in sessions that die by SIGKILL
before their n-th event (a call that changes the run's folder, a sync, a micro-batch, a validation), and then in one
that is left alone. Each of these sessions is a process of its own, forked: that saves loading torch each time.
"""

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

from tiny_task import TinyTask

from mmpeft.config import TrainSettings
from mmpeft.errors import MmpeftError
from mmpeft.trainers import launch, loop

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


class Events:
    """Counts what a session does to its folder, and ends the process at a given count."""

    def __init__(self, out: Path, kill_at: int | None) -> None:
        self.out, self.kill_at, self.count = str(out), kill_at, 0

    def note(self) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def listen(self) -> None:
        sync = os.fsync

        def counted_sync(descriptor: int) -> None:
            self.note()
            sync(descriptor)

        os.fsync = counted_sync
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+")
        if (writes or event in CHANGES) and str(arguments[0]).startswith(self.out):
            self.note()


class WatchedTask(TinyTask):
    """Its micro-batches and validations are events too; at one step it may signal its own process."""

    events: Events
    signals: dict[int, list[int]]

    def loss(self, samples, *, step, epoch, step_size):
        self.events.note()
        for number in self.signals.pop(step, []):
            os.kill(os.getpid(), number)
        return super().loss(samples, step=step, epoch=epoch, step_size=step_size)

    def validate(self):
        self.events.note()
        return super().validate()


def session(told: dict, kill_at: int | None = None) -> loop.LoopResult:
    out = Path(told["out"])
    out.mkdir(parents=True, exist_ok=True)
    task = WatchedTask(**told.get("task", {}))
    rank = int(os.environ.get("RANK", "0"))
    told_rank = told.get("signal_rank", 0)
    task.signals = {
        int(step): numbers for step, numbers in told.get("signals", {}).items() if rank == told_rank
    }
    task.events = Events(out, kill_at)
    task.events.listen()
    settings = TrainSettings(**told["train"])
    result = loop.train(
        task,
        settings,
        seed=0,
        out=out,
        recipe={f"train.{key}": value for key, value in settings.model_dump(mode="json").items()},
        validate_every=told.get("validate_every"),
        preview_every=told.get("preview_every"),
        resume=told.get("resume", False),
    )
    if rank == 0:
        report = {"events": task.events.count, "steps": result.steps, "stopped_by": result.stopped_by}
        out.with_suffix(".json").write_text(json.dumps(report))
    return result


def run(told: dict, kill_at: int | None = None) -> int:
    """Run one session; give the exit code that the command line would give."""
    if "file_size" in told:
        resource.setrlimit(resource.RLIMIT_FSIZE, (told["file_size"], told["file_size"]))
    try:
        stopped_by = session(told, kill_at).stopped_by
    except MmpeftError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 128 + stopped_by if stopped_by else 0


def forked(told: dict, kill_at: int | None = None) -> int:
    """Run a session in a process of its own; give its exit code, negative for a signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run(told, kill_at)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(told: dict) -> int:
    if "sessions" not in told and "chains" not in told:
        return run(told)
    import accelerate  # noqa: F401  loaded before the forks, not in each of them
    import torch._dynamo  # noqa: F401

    if "sessions" in told:
        print(json.dumps([forked({**told, **changed}) for changed in told["sessions"]]))
        return 0
    for folder, chain in told["chains"].items():
        resumed = {**told, "out": f"{told['out']}/{folder}", "resume": True}
        for number in chain:
            if forked(resumed, number) != -signal.SIGKILL:
                print(
                    f"{folder}: the session to be killed at event {number} ended otherwise", file=sys.stderr
                )
                return 1
        if forked(resumed) != 0:
            return 1
    return 0


if __name__ == "__main__":
    code = main(json.loads(sys.argv[1]))
    launch.leave(code)
    sys.exit(code)
