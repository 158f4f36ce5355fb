"""A folder of images with captions, looked through as a whole before anything is trained on it."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import ClassVar, Literal, Self

from PIL import Image
from pydantic import Field, field_validator

from mmpeft.config import PluginSettings
from mmpeft.data.caption_files import METADATA, SIDECARS, Caption, find_captions
from mmpeft.data.findings import Finding
from mmpeft.data.pictures import decode, difference_hash, fit, open_image, pixels, rgb, thumbnail
from mmpeft.errors import ConfigError, DataError

__all__ = ["ImageFolder", "ImageFolderSettings", "ImageRecord", "fit", "open_image", "pixels"]

# .heic cannot be decoded without a plugin of Pillow; it is listed so that it is named rather than overlooked.
SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}


class ImageFolderSettings(PluginSettings):
    """Images in a folder, with captions beside them."""

    name: Literal["image_folder"] = "image_folder"
    images: Path | None = None
    """folder of the images; sub-folders belong to it"""
    resolution: int | None = Field(None, ge=8)
    """side of the square whose area no training size exceeds, pixels; none takes the base's own"""
    max_aspect: float = Field(2.0, ge=1)
    """longest side over shortest of a training size, at most; longer images are cropped"""
    crop: Literal["center", "random"] = "center"
    """where the part that is trained on lies; random draws it anew at each visit, which turns the latent cache off"""
    flip: bool = True
    """mirror half of the visits left to right; off for text, faces and other things with a side"""
    background: str = "white"
    """colour under transparent parts"""
    caption: str | None = None
    """caption of every image that has none of its own"""
    trigger: str | None = None
    """word that calls the adapter; joined to every caption that does not have it"""
    trigger_position: Literal["first", "last"] = "last"
    """end of the caption that the trigger is joined to"""
    caption_dropout: float = Field(0.0, ge=0, le=1)
    """share of the visits without any caption, so that guidance keeps working"""
    shuffle_tags: bool = False
    """draw the order of comma-separated tags anew at each visit"""
    keep_tags: int = Field(0, ge=0)
    """tags at the start of a caption that are not shuffled"""
    repeats: int = Field(1, ge=1)
    """visits of each image per epoch, times what a folder's name says"""

    @field_validator("background")
    @classmethod
    def _check_background(cls, value: str) -> str:
        try:
            rgb(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value


@dataclass(frozen=True)
class ImageRecord:
    """An image that can be read, and what is said about it.

    Attributes:
        path: the file.
        name: relative to the folder, "/" between the parts.
        caption: as found, white space made single spaces; "" when it was found empty, None when there is none.
        caption_source: name of the file or folder that says it, "data.caption", or "".
        repeats: visits per epoch; 0 for an image that a folder's name leaves out.
        size: width and height after orientation, pixels.
        digest: hash of the size and of the RGB pixels after orientation and background.
        looks: `difference_hash` of the picture, 64 bit.
        thumbnail: `thumbnail` of the picture.
    """

    path: Path
    name: str
    caption: str | None
    caption_source: str
    repeats: int
    size: tuple[int, int]
    digest: str
    looks: int
    thumbnail: bytes


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder in the order of their names.

    Attributes:
        folder: the folder.
        settings: what it was looked at with.
        records: the images that can be read.
        problems: what is wrong or worth knowing about files; an image that cannot be read is an error here, and in
            no record.
    """

    settings_type: ClassVar[type[ImageFolderSettings]] = ImageFolderSettings

    folder: Path
    settings: ImageFolderSettings
    records: tuple[ImageRecord, ...]
    problems: tuple[Finding, ...]

    @classmethod
    def scan(cls, folder: Path, settings: ImageFolderSettings) -> Self:
        """Find and decode every image below a folder, and find its caption.

        Every file is decoded once here, so that a broken one is known before time is spent. Hidden files and
        folders are passed over. `mmpeft.data.caption_files` says where captions are looked for, and which comes first.

        Raises:
            DataError: there is no such folder, or no image in it that can be trained on.
        """
        folder = Path(folder)
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "does not exist"
            raise DataError(f"the image folder {folder} {what}; data.images names a folder of images")
        files = sorted(_files(folder), key=lambda path: path.relative_to(folder).as_posix())
        images = [path for path in files if path.suffix.lower() in SUFFIXES]
        if not images:
            raise DataError(
                f"there is no image in {folder} ({len(files)} other files); images end in {', '.join(sorted(SUFFIXES))}"
            )
        others = [path for path in files if path.suffix.lower() not in SUFFIXES]
        captions, problems = find_captions(folder, images, others, settings.caption)
        problems += _unknown_files(folder, others)
        records: list[ImageRecord] = []
        # Few threads: each holds a whole decoded image.
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for looked in pool.map(_look, repeat(folder), images, captions, repeat(settings)):
                problems += [part for part in looked if isinstance(part, Finding)]
                records += [part for part in looked if isinstance(part, ImageRecord)]
        if not any(record.repeats for record in records):
            first = next((problem for problem in problems if problem.topic in ("unreadable", "folder")), None)
            because = f", for example {first.file}: {first.message}" if first else ""
            raise DataError(f"none of the {len(images)} images in {folder} can be trained on{because}")
        return cls(folder, settings, tuple(records), tuple(problems))

    @cached_property
    def samples(self) -> tuple[int, ...]:
        """Indices of `records`, each as often as an epoch visits it."""
        return tuple(place for place, record in enumerate(self.records) for _ in range(record.repeats))

    @cached_property
    def digest(self) -> str:
        """Hash of what is trained on: pixels, captions and repeats, not names."""
        state = hashlib.blake2b(digest_size=16)
        for record in self.records:
            state.update(repr((record.digest, record.caption, record.repeats)).encode())
        return state.hexdigest()

    def picture(self, place: int) -> Image.Image:
        """Open the image of a record again: RGB, upright, on the background.

        Raises:
            DataError: it is not what it was when the folder was looked through.
        """
        record = self.records[place]
        image = open_image(record.path, self.settings.background)
        if _digest(image) != record.digest:
            raise DataError(f"{record.path} was changed since the folder was looked through; start again")
        return image


def _files(folder: Path) -> Iterator[Path]:
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        # A link to a folder above would lead round in circles.
        seen.add(os.path.realpath(parent))
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__MACOSX"))
            and os.path.realpath(os.path.join(parent, name)) not in seen
        ]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _unknown_files(folder: Path, others: list[Path]) -> list[Finding]:
    unknown = [
        path.relative_to(folder).as_posix()
        for path in others
        if path.suffix.lower() not in SIDECARS and path.name.lower() not in METADATA
    ]
    return [
        Finding("note", name, "is neither image nor caption; it is not used", "other") for name in unknown
    ]


def _look(
    folder: Path, path: Path, caption: Caption, settings: ImageFolderSettings
) -> list[ImageRecord | Finding]:
    name = path.relative_to(folder).as_posix()
    try:
        image, remarks = decode(path, settings.background)
    except DataError as error:
        return [Finding("error", name, str(error), "unreadable")]
    record = ImageRecord(
        path=path,
        name=name,
        caption=caption.text,
        caption_source=caption.source,
        repeats=caption.repeats * settings.repeats,
        size=image.size,
        digest=_digest(image),
        looks=difference_hash(image),
        thumbnail=thumbnail(image),
    )
    return [record, *(Finding("note", name, remark, "picture") for remark in remarks)]


def _digest(image: Image.Image) -> str:
    return hashlib.blake2b(
        f"{image.width}x{image.height}:".encode() + image.tobytes(), digest_size=20
    ).hexdigest()
