"""What frozen models make of images and captions, kept on disk under a name that says what it was made from.

An entry can only be found again by something with the same content: an edited image, another crop, another VAE
have another key. Nothing is ever out of date, so nothing has to be cleared; the folder may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmpeft.disk.safetensors_file import stored_bytes
from mmpeft.errors import DataError

CODE_VERSION = 1
"""Part of every key; to be raised when what is computed from the same input changes."""


def latent_key(
    image_digest: str, bucket: tuple[int, int], left: float, top: float, flip: bool, vae_fingerprint: str
) -> str:
    """Name the latents of one crop of an image.

    Args:
        image_digest: of the decoded, upright pixels, as `ImageRecord.digest`.
        bucket: width and height that the image is fitted to, pixels.
        left: crop offset, as `fit` takes it.
        top: crop offset, as `fit` takes it.
        flip: whether the crop is mirrored left to right.
        vae_fingerprint: of the VAE's weights and of the precision it computes in.
    """
    return content_key("latent", image_digest, list(bucket), float(left), float(top), flip, vae_fingerprint)


def text_key(caption: str, tokenizer_digest: str, encoder_fingerprint: str, clip_skip: int) -> str:
    """Name the text embedding of a final caption (after trigger, shuffle and dropout)."""
    return content_key("text", caption, tokenizer_digest, encoder_fingerprint, clip_skip)


class TensorCache:
    """Named tensors on disk, a safetensors file for each key; several processes may share a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def get(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Read an entry, or make it and keep it.

        An entry that is torn, damaged or misnamed is made again. Writing is atomic: another process sees the whole
        entry or none.

        Args:
            key: from `latent_key` or `text_key`.
            make: computes the tensors, of any shape, type and device.

        Returns:
            The tensors on the CPU, with the same bytes whether they were read or made.

        Raises:
            DataError: the entry cannot be written, because the disk is full for example.
        """
        path = self.folder / key[:2] / f"{key}.safetensors"
        found = _read(path, key)
        if found is not None:
            return found
        made = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        _write(path, save(made, {"key": key, "digest": _digest(made)}))
        return made


def content_key(*parts: object) -> str:
    """Name an entry by everything that it was made from, in JSON values."""
    return hashlib.blake2b(json.dumps([CODE_VERSION, *parts]).encode(), digest_size=20).hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        state.update(stored_bytes(tensor))
    return state.hexdigest()


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError, UnicodeDecodeError):
        return None
    return tensors if metadata == {"key": key, "digest": _digest(tensors)} else None


def _write(path: Path, content: bytes) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise DataError(
            f"the cache {path.parent.parent} cannot take an entry of {len(content)} bytes ({_free(path)} free): "
            f"{error.strerror}; make room there, or put the cache elsewhere"
        ) from error


def _free(path: Path) -> str:
    for folder in path.parents:
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(folder).free} bytes"
    return "an unknown number of bytes"
