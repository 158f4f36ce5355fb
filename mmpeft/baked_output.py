"""Where a baked base goes: what is copied with it, what may be replaced, and that it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft.disk.base_files import BaseFiles
from mmpeft.disk.json_files import read_object
from mmpeft.disk.safetensors_file import PICKLES
from mmpeft.disk.whole_writes import swap
from mmpeft.errors import BaseError, ConfigError

LINEAGE = "mmpeft_bake.json"
# Weights in other formats, which would keep the unchanged model beside the changed one.
_OTHER_WEIGHTS = (*PICKLES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", ".pb")


@dataclass(frozen=True)
class Output:
    """The folder or file that a baked base becomes.

    Args:
        base: what is baked.
        path: the new folder or file.
    """

    base: BaseFiles
    path: Path

    @property
    def lineage(self) -> str:
        """The name of the file that tells what went in: in the folder, or beside the file."""
        return f"{self.path.stem}.{LINEAGE}" if self.base.is_file else LINEAGE

    @property
    def earlier(self) -> Any:
        """What the base's own lineage file says, if it was baked itself; else None."""
        name = f"{self.base.path.stem}.{LINEAGE}" if self.base.is_file else LINEAGE
        file = (self.base.path.parent if self.base.is_file else self.base.path) / name
        return read_object(file, BaseError) if file.is_file() else None

    def check(self, adapters: Collection[Path]) -> None:
        """Refuse what would be lost or confused.

        Args:
            adapters: where the adapters lie.

        Raises:
            ConfigError: there is something that is no earlier bake, or base, adapters and result lie in each other.
        """
        out, base = self.path.resolve(), self.base.path.resolve()
        if self.base.is_file != (out.suffix == ".safetensors"):
            needed = (
                "a .safetensors file, as the base is" if self.base.is_file else "a folder, as the base is"
            )
            raise ConfigError(f"the result must be {needed}; got {self.path}")
        if out == base or out in base.parents or base in out.parents:
            raise ConfigError(
                f"{self.path} and the base lie in each other; choose another place for the result"
            )
        if inside := [path for path in adapters if out in path.resolve().parents or out == path.resolve()]:
            raise ConfigError(
                f"the adapter {inside[0]} lies in {self.path}, which would be replaced; move it"
            )
        mark = out.parent / self.lineage if self.base.is_file else out / LINEAGE
        is_empty = out.is_dir() and not self.base.is_file and not any(out.iterdir())
        if out.exists() and not is_empty and not mark.is_file():
            raise ConfigError(
                f"{self.path} holds something that is no earlier bake; choose another place or remove it"
            )

    def copied(self, components: Collection[str]) -> tuple[list[Path], list[Path]]:
        """Sort a base folder's files into those that go along and those that would contradict the result.

        Args:
            components: those that change.

        Returns:
            Relative paths, sorted: of all files to write, and of other copies of the weights that change.
        """
        if self.base.is_file:
            return [Path(self.path.name)], []
        along: list[Path] = []
        stale: list[Path] = []
        for path in sorted(self.base.path.rglob("*")):
            relative = path.relative_to(self.base.path)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                (stale if self._is_stale(path, components) else along).append(relative)
        return [path for path in along if path != Path(LINEAGE)], stale

    def _is_stale(self, path: Path, components: Collection[str]) -> bool:
        folders = [self.base.folders[component] for component in components]
        is_other = path.name.lower().endswith(_OTHER_WEIGHTS) or ".bin.index" in path.name
        is_whole_model = path.parent == self.base.path and path.suffix == ".safetensors"
        return (is_other and any(folder in path.parents for folder in folders)) or (
            (is_other or is_whole_model) and path.parent == self.base.path and self.base.path not in folders
        )

    @contextmanager
    def whole(self, size: int) -> Iterator[Path]:
        """Give a folder to write into; what is in it takes its place when the block ends well, else it is gone.

        Args:
            size: bytes that will be needed.

        Raises:
            BaseError: it cannot be written, or the disk has no room.
        """
        beside: Path | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(self.path.parent).free) < size:
                raise BaseError(
                    f"{self.path} needs {size / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB left; free some or "
                    f"choose another disk"
                )
            beside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
            fresh = beside / "new"
            fresh.mkdir()
            yield fresh
            self._put(fresh, beside / "old")
        except OSError as error:
            raise BaseError(f"cannot write {self.path}: {error.strerror or error}") from error
        finally:
            if beside is not None:
                shutil.rmtree(beside, ignore_errors=True)

    def _put(self, fresh: Path, old: Path) -> None:
        if self.base.is_file:
            # the lineage first: without it, the file could not be replaced later
            for name in (self.lineage, self.path.name):
                os.replace(fresh / name, self.path.parent / name)
            return
        swap(fresh, self.path, old)
