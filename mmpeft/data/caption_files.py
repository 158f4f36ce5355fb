"""Where captions and repeats come from: files beside the images, metadata tables, folder names.

What belongs to one image comes before what belongs to many: a sidecar `.txt`, a sidecar `.caption`, the metadata
table nearest to the image (`.jsonl` before `.csv`), the name of a kohya folder, the one caption for all. The first
that is there counts, even when it is empty; a sidecar or table that says something else is reported.
"""

import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft.data.findings import Finding, Level

SIDECARS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTION_COLUMNS = ("text", "caption")
_REPEATED_FOLDER = re.compile(r"(\d+)_(.+)")
# More repeats than anybody means: such a folder is named after a date ("2024_summer").
_MANY_REPEATS = 1000


@dataclass(frozen=True)
class Caption:
    """The caption of an image, where it was found, and how often an epoch visits the image because of its folder.

    Attributes:
        text: with all white space made single spaces; None when there is none anywhere.
        source: file or folder name relative to the data folder, "data.caption" or "".
        repeats: from the kohya folder, 1 elsewhere.
    """

    text: str | None
    source: str
    repeats: int


def find_captions(
    root: Path, images: Sequence[Path], others: Sequence[Path], for_all: str | None
) -> tuple[list[Caption], list[Finding]]:
    """Find the caption of each image among the other files of a folder.

    Args:
        root: the data folder; only folders below it are looked at as kohya folders.
        images: paths below `root`.
        others: the other files below `root`.
        for_all: the caption of images that have none of their own.

    Returns:
        A caption for each image, and what should be known: unreadable caption files (errors), captions that
        contradict each other, that belong to no image or that are not used.
    """
    findings: list[Finding] = []
    candidates: dict[Path, list[tuple[str, str]]] = defaultdict(list)
    _read_sidecars(root, images, others, candidates, findings)
    _read_tables(root, images, others, candidates, findings)
    captions = [_choose(root, image, candidates[image], for_all, findings) for image in images]
    _tell_folders(root, images, findings)
    own = sum(caption.source not in ("data.caption", "") for caption in captions)
    if for_all is not None and own:
        message = (
            f"data.caption is not used for {own} of {len(images)} images: they have captions of their own"
        )
        findings.append(Finding("note", None, message, "caption"))
    return captions, findings


def _choose(
    root: Path, image: Path, candidates: list[tuple[str, str]], for_all: str | None, findings: list[Finding]
) -> Caption:
    folder = _repeated_folder(root, image)
    repeats = int(folder.groups()[0]) if folder else 1
    if candidates:
        source, text = candidates[0]
        for other_source, other in candidates[1:]:
            if other != text:
                message = (
                    f"has two captions: {text!r} in {source}, which is used, and {other!r} in {other_source}"
                )
                findings.append(Finding("warning", _name(root, image), message, "caption"))
        return Caption(text, source, repeats)
    if folder:
        return Caption(_plain(folder.groups()[1]), folder.string, repeats)
    if for_all is not None:
        return Caption(_plain(for_all), "data.caption", repeats)
    return Caption(None, "", repeats)


def _repeated_folder(root: Path, image: Path) -> re.Match[str] | None:
    for folder in image.relative_to(root).parents:
        match = _REPEATED_FOLDER.fullmatch(folder.name)
        if match:
            return match
    return None


def _tell_folders(root: Path, images: Sequence[Path], findings: list[Finding]) -> None:
    folders = {match.string: match for match in (_repeated_folder(root, image) for image in images) if match}
    for name, match in sorted(folders.items()):
        repeats = int(match.groups()[0])
        message = f"the folder's name says: {repeats} visits per epoch, caption {_plain(match.groups()[1])!r}"
        if repeats == 0 or repeats > _MANY_REPEATS:
            findings.append(Finding("warning", name, f"{message}; rename it if that is not meant", "folder"))
        else:
            findings.append(Finding("note", name, message, "folder"))


def _read_sidecars(
    root: Path,
    images: Sequence[Path],
    others: Sequence[Path],
    candidates: dict[Path, list[tuple[str, str]]],
    findings: list[Finding],
) -> None:
    by_stem: dict[Path, list[Path]] = defaultdict(list)
    for image in images:
        by_stem[image.with_suffix("")].append(image)
    for suffix in SIDECARS:
        for path in (other for other in others if other.suffix.lower() == suffix):
            owners = by_stem.get(path.with_suffix(""), [])
            if not owners:
                message = "is the caption of no image; it needs the image's name, with another ending"
                findings.append(Finding("note", _name(root, path), message, "caption"))
                continue
            text = _read(root, path, findings)
            if text is None:
                continue
            if len(text.split("\n")) > 1 and len(list(filter(str.strip, text.split("\n")))) > 1:
                message = "has several lines; they are read as one caption"
                findings.append(Finding("note", _name(root, path), message, "caption"))
            for image in owners:
                candidates[image].append((_name(root, path), _plain(text)))


def _read_tables(
    root: Path,
    images: Sequence[Path],
    others: Sequence[Path],
    candidates: dict[Path, list[tuple[str, str]]],
    findings: list[Finding],
) -> None:
    known = set(images)
    tables = [path for path in others if path.name.lower() in METADATA]
    # The nearest table first: the deepest one, of two in one folder the .jsonl.
    for path in sorted(
        tables, key=lambda table: (-len(table.parts), METADATA.index(table.name.lower()), table)
    ):
        name = _name(root, path)
        text = _read(root, path, findings)
        try:
            for where, row in _rows(path, text or ""):
                image = Path(os.path.normpath(path.parent / str(row.get("file_name"))))
                caption = next(
                    (row[column] for column in _CAPTION_COLUMNS if row.get(column) is not None), None
                )
                if not row.get("file_name"):
                    findings.append(Finding("error", name, f"{where} has no file_name", "caption"))
                elif image not in known:
                    message = f"{where} names {row['file_name']}, which is no image in this folder"
                    findings.append(Finding("warning", name, message, "caption"))
                elif not isinstance(caption, str):
                    message = f"{where} has no caption in a column called {' or '.join(_CAPTION_COLUMNS)}"
                    level: Level = "warning" if caption is None else "error"
                    findings.append(Finding(level, name, message, "caption"))
                else:
                    candidates[image].append((name, _plain(caption)))
        except (ValueError, csv.Error) as error:
            findings.append(Finding("error", name, f"cannot be read: {error}", "caption"))


def _rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for row in reader:
            yield f"line {reader.line_num}", row
        return
    # Only "\n" ends a line of JSON: other line separators may stand inside a caption.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            yield f"line {number}", row


def _read(root: Path, path: Path, findings: list[Finding]) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        findings.append(
            Finding("error", _name(root, path), f"cannot be read as UTF-8 text: {error}", "caption")
        )
        return None


def _plain(text: str) -> str:
    return " ".join(text.split())


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()
