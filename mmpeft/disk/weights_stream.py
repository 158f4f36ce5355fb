"""Safetensors files tensor by tensor: one tensor is in memory at a time, however large the file is.

Values change, sizes do not: the header of a rewritten file is the old one, byte for byte, metadata and order included.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

import safetensors
import torch
from torch import Tensor

from mmpeft.errors import BaseError

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 24  # bytes copied at once


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor.

    Args:
        dtype: safetensors' name of the type ("BF16").
        begin: first byte in the file.
        end: the byte after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class WeightsFile:
    """A safetensors file whose header was read and checked.

    Args:
        header: the bytes before the first tensor.
        entries: by key, in the order of their bytes.
    """

    path: Path
    header: bytes = field(repr=False)
    entries: Mapping[str, Entry] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and check the header.

        Raises:
            BaseError: the file is broken, truncated, or none of this format.
        """
        try:
            # the library checks that the header is whole, without gaps, and as long as the file
            with safetensors.safe_open(path, framework="pt"):
                pass
            with path.open("rb") as stream:
                start = stream.read(8)
                header = start + stream.read(int.from_bytes(start, "little"))
        except (safetensors.SafetensorError, OSError) as error:
            raise BaseError(f"{path.name} cannot be read as a safetensors file: {error}") from error
        tensors = {key: value for key, value in json.loads(header[8:]).items() if key != "__metadata__"}
        entries = {
            key: Entry(
                value["dtype"], tuple(value["shape"]), *(len(header) + at for at in value["data_offsets"])
            )
            for key, value in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"])
        }
        return cls(path, header, entries)

    def read(self, key: str) -> Tensor:
        """Read one tensor of a float type, in the file's type, writable."""
        with self.path.open("rb") as stream:
            return _tensor(self.entries[key], _bytes(stream, self.entries[key]))

    def rewrite(self, to: Path, changes: Mapping[str, Callable[[Tensor], None]]) -> str:
        """Write a copy in which some tensors are changed in place.

        Args:
            to: a file that does not exist yet.
            changes: by key: what changes the tensor, which is of a float type.

        Returns:
            The SHA-256 of the new file, hexadecimal.
        """
        sha = hashlib.sha256()
        with self.path.open("rb") as stream, to.open("xb") as out:

            def write(data: bytes | bytearray) -> None:
                sha.update(data)
                out.write(data)

            write(self.header)
            for key, entry in self.entries.items():
                if key in changes:
                    data = _bytes(stream, entry)
                    changes[key](_tensor(entry, data))
                    write(data)
                else:
                    stream.seek(entry.begin)
                    for left in range(entry.end - entry.begin, 0, -_CHUNK):
                        write(stream.read(min(left, _CHUNK)))
            out.flush()
            os.fsync(out.fileno())
        return sha.hexdigest()


def _bytes(stream: BinaryIO, entry: Entry) -> bytearray:
    data = bytearray(entry.end - entry.begin)
    stream.seek(entry.begin)
    stream.readinto(data)  # type: ignore[attr-defined]  # what open("rb") gives has it
    return data


def _tensor(entry: Entry, data: bytearray) -> Tensor:
    """See bytes as a tensor; a change of one is a change of the other."""
    return torch.frombuffer(data, dtype=FLOAT_TYPES[entry.dtype]).reshape(entry.shape)
