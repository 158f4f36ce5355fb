import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny_task import content

from mmpeft.errors import ConfigError, TrainingError
from mmpeft.trainers import checkpoint
from mmpeft.trainers.checkpoint import Checkpoint


def saved(step: int) -> Checkpoint:
    return Checkpoint(step, {"parameters": {"a": torch.full((3,), float(step))}}, {"step": step, "x": 0.1})


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path):
    path = checkpoint.write(tmp_path, saved(7), keep=2)
    back = checkpoint.read(path)
    assert path.name == "step-000007"
    assert (back.step, back.state) == (7, {"step": 7, "x": 0.1})
    assert torch.equal(back.tensors["parameters"]["a"], torch.full((3,), 7.0))


def test_the_newest_are_kept(tmp_path: Path):
    for step in (1, 2, 30, 4_000_000):
        checkpoint.write(tmp_path, saved(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000030", "step-4000000"]
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-4000000", [])


def test_checkpoints_of_a_course_that_was_left_go(tmp_path: Path):
    for step in (5, 10, 15):
        checkpoint.write(tmp_path, saved(step), keep=3)
    checkpoint.write(tmp_path, saved(7), keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000005", "step-000007"]


@pytest.mark.parametrize("damage", ["cut", "flip", "lost", "no manifest", "torn manifest", "odd manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path: Path, damage: str):
    checkpoint.write(tmp_path, saved(1), keep=3)
    path = checkpoint.write(tmp_path, saved(2), keep=3)
    weights, manifest = path / "parameters.safetensors", path / "manifest.json"
    data = weights.read_bytes()
    match damage:
        case "cut":
            weights.write_bytes(data[:-1])
        case "flip":
            weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "lost":
            weights.unlink()
        case "no manifest":
            manifest.unlink()
        case "torn manifest":
            manifest.write_bytes(manifest.read_bytes()[:20])
        case "odd manifest":
            manifest.write_text("[]")
    found = checkpoint.newest(tmp_path)
    assert found.path == tmp_path / "step-000001"
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith("step-000002: ")
    with pytest.raises(TrainingError, match="is no whole checkpoint"):
        checkpoint.read(path)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "adapter"
    checkpoint.replace_folder(target, lambda folder: (folder / "a").write_text("old"))

    def fail(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        checkpoint.replace_folder(target, fail)
    assert content(tmp_path) == {"adapter/a": b"old"}
    checkpoint.replace_folder(target, lambda folder: (folder / "b").write_text("new"))
    assert content(tmp_path) == {"adapter/b": b"new"}


def test_what_a_dead_process_left_is_cleared_and_an_old_folder_put_back(tmp_path: Path):
    for name in ("new-adapter", "old-adapter", "gone-step-000001"):
        (tmp_path / f".unfinished-{name}").mkdir()
        (tmp_path / f".unfinished-{name}/file").write_text(name)
    checkpoint.clean(tmp_path)
    assert content(tmp_path) == {"adapter/file": b"old-adapter"}


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path):
    again = checkpoint.claim(tmp_path)
    with checkpoint.claim(tmp_path), pytest.raises(ConfigError, match="another process trains into"), again:
        pass
    with checkpoint.claim(tmp_path):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_says_what_is_needed_and_what_stands(tmp_path: Path, error: Exception):
    checkpoint.write(tmp_path / "checkpoints", saved(12), keep=1)
    with (
        pytest.raises(TrainingError, match=r"about 1,234 bytes are needed, .*checkpoint step-000012 stands"),
        checkpoint.clear_disk_errors(tmp_path / "checkpoints", 1234),
    ):
        raise error


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path: Path):
    with pytest.raises(PermissionError), checkpoint.clear_disk_errors(tmp_path, 1):
        raise PermissionError(errno.EACCES, "no")
