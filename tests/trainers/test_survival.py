"""Real training processes that are killed, asked to stop, or run out of space."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_task import content

from mmpeft.trainers import checkpoint

CHILD = Path(__file__).parent / "train_child.py"
# Of the events at which a run can be killed, every how many-th is tried.
EVERY = int(os.environ.get("MMPEFT_TEST_KILL_EVERY", "2"))
RUN = {
    "train": {
        "steps": 6,
        "batch_size": 2,
        "accumulate": 2,
        "ema": 0.9,
        "checkpoint_every": 2,
        "keep_checkpoints": 2,
        "schedule": "cosine",
        "warmup_steps": 2,
        "learning_rate": 0.01,
    },
    "task": {"dropout": 0.3, "stop_after": [0.5, 1.0]},
    "validate_every": 2,
    "preview_every": 4,
}


def start(told: dict, limit: float = 400) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, CHILD, json.dumps(told)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
    )


def report(out: Path) -> dict:
    return json.loads(out.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    done = start({**RUN, "out": str(out)})
    assert done.returncode == 0, done.stderr
    return out


def assert_same_artefacts(out: Path, expected: Path) -> None:
    for name in ("adapter", "best", "previews"):
        assert content(out / name) == content(expected / name), f"{out}/{name}"
    leftovers = [path for path in out.rglob(".*") if path.name != ".lock"]
    assert not leftovers


def test_the_same_seed_gives_the_same_bytes(uninterrupted: Path, tmp_path: Path):
    again = start({**RUN, "out": str(tmp_path / "run")})
    assert again.returncode == 0, again.stderr
    assert_same_artefacts(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_killed_anywhere_and_resumed_it_ends_byte_for_byte_as_if_never_killed(
    uninterrupted: Path, tmp_path: Path
):
    events = report(uninterrupted)["events"]
    assert events > 80  # otherwise the events are not being counted
    chains = {f"at-{n}": [n] for n in range(1, events + 1, EVERY)}
    done = start({**RUN, "out": str(tmp_path), "chains": chains})
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in chains:
        assert_same_artefacts(tmp_path / folder, uninterrupted)


def test_killed_again_and_again_it_still_ends_the_same(uninterrupted: Path, tmp_path: Path):
    chains = {"a": [10, 35, 36, 20, 30, 15], "b": [70, 8, 8, 20], "c": [25] * 3}
    done = start({**RUN, "out": str(tmp_path), "chains": chains})
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in chains:
        assert_same_artefacts(tmp_path / folder, uninterrupted)


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(uninterrupted: Path, tmp_path: Path):
    for number in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / str(int(number))
        stop = {"signals": {"2": [number]}}
        done = start({**RUN, "out": str(out), "sessions": [stop, {"resume": True}]})
        assert json.loads(done.stdout) == [128 + number, 0]
        assert (
            "resumed from step-000003" in done.stderr
        )  # it checkpoints every second step unless asked to stop
        assert_same_artefacts(out, uninterrupted)


def test_a_run_that_was_stopped_has_an_adapter(tmp_path: Path):
    stopped = start({**RUN, "out": str(tmp_path / "run"), "signals": {"2": [signal.SIGTERM]}})
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "stopping after this step" in stopped.stderr
    assert report(tmp_path / "run")["steps"] == 3
    assert (tmp_path / "run/adapter/weights.safetensors").is_file()


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path):
    stopped = start({**RUN, "out": str(tmp_path / "run"), "signals": {"4": [signal.SIGINT, signal.SIGINT]}})
    assert "KeyboardInterrupt" in stopped.stderr
    assert not (tmp_path / "run/checkpoints/step-000005").exists()
    assert (tmp_path / "run/checkpoints/step-000004").is_dir()


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stands(uninterrupted: Path, tmp_path: Path):
    largest = max(len(data) for data in content(uninterrupted / "checkpoints").values())
    stop, full = {"signals": {"3": [signal.SIGTERM]}}, {"resume": True, "file_size": largest - 1}
    done = start({**RUN, "out": str(tmp_path / "run"), "sessions": [stop, full]})
    assert json.loads(done.stdout) == [143, 2]
    assert "TrainingError: no space to save" in done.stderr
    assert "bytes are needed" in done.stderr
    assert "checkpoint step-000004 stands" in done.stderr
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-000002", "step-000004"]
    assert all(checkpoint.verify(tmp_path / "run/checkpoints" / name) is None for name in kept)
    assert not list((tmp_path / "run").rglob(".unfinished*"))


def test_a_full_disk_while_the_adapter_is_saved_leaves_the_old_adapter(uninterrupted: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    weights = len((out / "adapter/weights.safetensors").read_bytes())
    # All steps are taken: the only thing left to do is to write the weights, which exceed the limit.
    full = start({**RUN, "out": str(out), "resume": True, "file_size": weights - 1})
    assert full.returncode == 2, full.stderr
    assert "checkpoint step-000006 stands" in full.stderr
    assert content(out / "adapter") == content(uninterrupted / "adapter")
    assert not list(out.rglob(".unfinished*"))
