"""safetensors files: read after their header was checked, written so that equal contents are equal bytes.

Nothing is unpickled, ever, and no tensor is read before the header was found to agree with itself and the file's size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mmpeft.errors import AdapterError, FormatError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file after checking its header against the file's size.

    Returns:
        The tensors by key, on the CPU in the file's types, and the header's metadata.

    Raises:
        AdapterError: it is a pickle by name or content.
        FormatError: it is empty, truncated, or its header is broken.
    """
    _, metadata = read_header(file)
    try:
        return safetensors.torch.load_file(file), metadata
    except safetensors.SafetensorError as error:
        raise FormatError(f"{file.name} is no valid safetensors file: {error}") from error
    except (RuntimeError, MemoryError) as error:
        size = file.stat().st_size
        raise AdapterError(f"{file.name} has {size:,} bytes, more than this machine can open") from error


def read_header(file: Path) -> tuple[list[str], dict[str, str]]:
    """Read a safetensors file's keys and metadata alone, checked against the file's size.

    Raises:
        AdapterError: it is a pickle by name or content.
        FormatError: it is empty, truncated, or its header is broken.
    """
    if file.suffix.lower() in PICKLES:
        raise AdapterError(
            f"{file.name} is a pickle, which can run code when opened; only .safetensors is read"
        )
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        is_oversized = length > min(_HEADER_LIMIT, size - 8)
        # torch.save writes a zip, or before 1.6 a bare pickle; the first bytes of both read as an absurd header length
        if start[:4] == b"PK\x03\x04" or (is_oversized and start[:1] == b"\x80"):
            raise AdapterError(f"{file.name} is a pickle under another name; only .safetensors is read")
        if size < 10:
            raise FormatError(
                f"{file.name} is empty" if size == 0 else f"{file.name} is truncated: {size} bytes"
            )
        if is_oversized:
            raise FormatError(
                f"{file.name} is truncated or no safetensors file: its header claims {length:,} bytes of {size:,}"
            )
        header = stream.read(length)
    return _checked(file.name, header, size - 8 - length)


def stored_bytes(tensor: Tensor) -> memoryview:
    """Give a tensor's bytes as a file has them: entries in their logical order, whatever the layout in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Write safetensors bytes with everything sorted; the library's own writer orders metadata at random."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks: list[memoryview] = []
    place = 0
    # wide types first, so that every tensor is aligned, as the library does it
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        data = stored_bytes(tensor)
        header[key] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + len(data)],
        }
        place += len(data)
        chunks.append(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *chunks])


def _checked(name: str, header: bytes, data_size: int) -> tuple[list[str], dict[str, str]]:
    """Check types, shapes and places of all tensors; give keys and metadata."""
    try:
        entries = json.loads(header)
        metadata = {str(k): str(v) for k, v in entries.pop("__metadata__", {}).items()}
        places = []
        for key, entry in entries.items():
            begin, end = entry["data_offsets"]
            count = 1
            for side in entry["shape"]:
                count *= side
            if entry["dtype"] not in _WIDTHS:
                raise FormatError(f"{name}: {key!r} has type {entry['dtype']}, which no adapter has")
            if not 0 <= begin <= end or end - begin != count * _WIDTHS[entry["dtype"]]:
                raise FormatError(f"{name}: the header contradicts itself about {key!r}")
            places.append((begin, end))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"{name} is no safetensors file: its header is no valid JSON table") from error
    if not entries:
        raise FormatError(f"{name} holds no tensors")
    needed = max(end for _, end in places)
    if needed > data_size:
        raise FormatError(f"{name} is truncated: its tensors need {needed:,} bytes, {data_size:,} are there")
    return list(entries), metadata
