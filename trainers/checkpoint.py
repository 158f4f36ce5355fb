"""Checkpoints and adapter folders that are on the disk whole or not at all. Safetensors and JSON, never pickle."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mmpeft.errors import ConfigError, TrainingError

MANIFEST = "manifest.json"
STATE = "state.json"
# A name that begins so is a folder that was being written or removed when its process died.
_UNFINISHED = ".unfinished-"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped."""

    step: int
    """optimiser steps that were taken"""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """file name without ending -> tensors by name, contiguous, on the CPU, none sharing memory"""
    state: Mapping[str, Any]
    """the rest, as JSON"""


class Newest(NamedTuple):
    """The newest checkpoint that verifies, and why newer ones were passed over."""

    path: Path | None
    skipped: list[str]


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write folder/step-000123: aside, synced, renamed; then remove all but the `keep` newest up to this step.

    Checkpoints of later steps belong to a course that this run has left; they go as well.

    Raises:
        TrainingError: the disk is full; nothing is left behind, and what stood before stands.
    """
    files = {f"{name}.safetensors": safetensors.torch.save(dict(t)) for name, t in checkpoint.tensors.items()}
    files[STATE] = _json(checkpoint.state)
    digests = {name: {"sha256": _sha256(data), "bytes": len(data)} for name, data in files.items()}
    files[MANIFEST] = _json({"step": checkpoint.step, "files": digests})

    def fill(place: Path) -> None:
        for name, data in files.items():
            (place / name).write_bytes(data)

    target = folder / f"step-{checkpoint.step:06d}"
    with clear_disk_errors(folder, sum(map(len, files.values()))):
        replace_folder(target, fill)
        _prune(folder, checkpoint.step, keep)
    return target


def newest(folder: Path) -> Newest:
    """Find the newest checkpoint of a folder whose files are what its manifest says; the folder may be missing."""
    skipped: list[str] = []
    for path in reversed(_all(folder)):
        fault = verify(path)
        if fault is None:
            return Newest(path, skipped)
        skipped.append(f"{path.name}: {fault}")
    return Newest(None, skipped)


def verify(path: Path) -> str | None:
    """Compare a checkpoint's files with its manifest; give what is wrong, or none."""
    try:
        expected = json.loads((path / MANIFEST).read_bytes())["files"]
        for name, entry in expected.items():
            if _sha256((path / name).read_bytes()) != entry["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        TrainingError: it is no whole checkpoint.
    """
    fault = verify(path)
    if fault is not None:
        raise TrainingError(f"{path} is no whole checkpoint ({fault}); resume from another one")
    manifest = json.loads((path / MANIFEST).read_bytes())
    tensors = {
        Path(name).stem: safetensors.torch.load((path / name).read_bytes())
        for name in manifest["files"]
        if name.endswith(".safetensors")
    }
    return Checkpoint(manifest["step"], tensors, json.loads((path / STATE).read_bytes()))


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder anew: filled aside, synced, then put in the place of the old one, which stays until then.

    Should the process die between the two renames, `clean` puts the old one back.

    Args:
        fill: writes the content into the empty folder it is given.
    """
    new, old = _aside(target, "new"), _aside(target, "old")
    _remove(new)
    new.mkdir(parents=True)
    try:
        fill(new)
        _sync_tree(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if target.exists():
        _remove(old)
        os.rename(target, old)
    os.rename(new, target)
    _sync_folder(target.parent)
    _remove(old)


def clean(folder: Path) -> None:
    """Clear away what a process that died left half written in a folder, and finish what it had begun to replace."""
    for leftover in sorted(folder.glob(f"{_UNFINISHED}*")):
        kind, _, name = leftover.name.removeprefix(_UNFINISHED).partition("-")
        target = folder / name
        if kind == "old" and not target.exists():
            os.rename(leftover, target)
        else:
            _remove(leftover)


@contextmanager
def claim(out: Path) -> Iterator[None]:
    """Keep a second run out of a run's folder; the claim ends with the process, however that ends.

    Raises:
        ConfigError: another process trains into it.
    """
    try:
        import fcntl
    except ImportError:  # no such lock on Windows
        yield
        return
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process trains into {out}; wait for it, or choose another out"
            ) from None
        yield


@contextmanager
def clear_disk_errors(folder: Path, needed: int) -> Iterator[None]:
    """Turn a full disk, a quota or a file-size limit within a with block into one sentence.

    Args:
        folder: of the checkpoints.
        needed: what is being written, bytes.

    Raises:
        TrainingError: says how much is needed, how much is free, and which checkpoint stands.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        standing = newest(folder).path
        stands = f"checkpoint {standing.name} stands" if standing else "no checkpoint was written yet"
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        raise TrainingError(
            f"no space to save in {folder.parent} ({error}): about {needed:,} bytes are needed, {free:,} are free "
            f"on the disk; {stands}; free some space (or raise the quota or file-size limit), then resume"
        ) from error


def _is_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL_DISK
    # safetensors' own writer reports the system's error number in its text only.
    return any(f"(os error {number})" in str(error) for number in _FULL_DISK)


def _prune(folder: Path, step: int, keep: int) -> None:
    paths = _all(folder)
    current = [path for path in paths if _step_of(path) <= step]
    for path in (set(paths) - set(current)) | set(current[:-keep]):
        # Renamed first: a checkpoint that is half removed must not look like a broken one.
        aside = _aside(path, "gone")
        _remove(aside)
        os.rename(path, aside)
        _remove(aside)


def _all(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _aside(target: Path, kind: str) -> Path:
    return target.with_name(f"{_UNFINISHED}{kind}-{target.name}")


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
