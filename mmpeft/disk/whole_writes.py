"""Files and folders that appear whole or not at all: written beside, then put in their place by renaming."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mmpeft.errors import AdapterError


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder of files by relative name, in the place of what `folder` is.

    Raises:
        AdapterError: a name leads outside, or the disk does not take it; `folder` is then as it was.
    """
    with _beside(folder) as beside:
        fresh = beside / "new"
        for name, content in sorted(contents.items()):
            file = fresh / name
            if not file.resolve().is_relative_to(fresh.resolve()):
                raise AdapterError(f"{name} would lie outside the adapter's folder")
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, content)
        swap(fresh, folder, beside / "old")


def write_file(file: Path, content: bytes) -> None:
    """Write a file, in the place of what is there.

    Raises:
        AdapterError: the disk does not take it; what was there is then as it was.
    """
    with _beside(file) as beside:
        _write(beside / file.name, content)
        (beside / file.name).replace(file)


def swap(fresh: Path, place: Path, old: Path) -> None:
    """Put a new folder in the place of one that may be there, which goes to `old` and, if this fails, comes back."""
    try:
        if place.exists():
            place.rename(old)
        fresh.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """Give a folder beside a place, on the same disk, for as long as the block lasts."""
    beside: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        yield beside
    except OSError as error:
        raise AdapterError(f"cannot write the adapter to {place}: {error.strerror or error}") from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
