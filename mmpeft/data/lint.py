"""What is wrong or worth knowing about an image folder before time is spent on it."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from statistics import median
from typing import Any

import numpy as np

from mmpeft.data.buckets import Bucket, choose_bucket
from mmpeft.data.captions import contains_words
from mmpeft.data.findings import Finding
from mmpeft.data.image_folder import ImageFolder, ImageRecord

# A copy that was resized, recompressed or brightened a little stays within both: of the 64 bits of the hash (up to 5
# were seen), and in every cell of the thumbnail (23 of 255 seen; other faces of one character differ by 52 or more).
NEAR_DUPLICATE_BITS = 8
NEAR_DUPLICATE_DIFFERENCE = 32
# An enlargement below this is hardly seen.
VISIBLE_ENLARGEMENT = 1.25
# Share of an image that may be cropped off without a word.
CROP_SHARE = Fraction(1, 3)
# Files of one topic that the text names; `as_dict` has all.
SHOWN_PER_TOPIC = 5


@dataclass(frozen=True)
class BucketUse:
    """How a bucket is used in an epoch.

    Attributes:
        bucket: the size.
        images: images of this size.
        samples: visits of them.
        steps: optimiser steps for these visits.
        short: samples of the last step when it is not full, else 0.
    """

    bucket: Bucket
    images: int
    samples: int
    steps: int
    short: int


@dataclass(frozen=True)
class CaptionStatistics:
    """The captions as the encoder reads them; tokens include what the tokenizer adds at both ends."""

    images: int
    missing: int
    empty: int
    distinct: int
    fewest_tokens: int
    median_tokens: float
    most_tokens: int
    token_limit: int


@dataclass(frozen=True)
class LintReport:
    """What `lint` found: findings from bad to good, the use of the buckets, the captions."""

    findings: tuple[Finding, ...]
    buckets: tuple[BucketUse, ...]
    captions: CaptionStatistics

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that should be mended before training."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    def as_dict(self) -> dict[str, Any]:
        """Give the whole report in JSON types."""
        buckets = [{**asdict(use), "bucket": str(use.bucket)} for use in self.buckets]
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "buckets": buckets,
            "captions": asdict(self.captions),
        }

    def text(self) -> str:
        """Give the report for a terminal; of many like findings the first few."""
        samples = sum(use.samples for use in self.buckets)
        steps = sum(use.steps for use in self.buckets)
        lines = [f"{self.captions.images} images, {samples} visits and {steps} steps per epoch", ""]
        lines.append(f"{'bucket':>11} {'images':>7} {'visits':>7} {'steps':>6}")
        for use in self.buckets:
            short = f"  last step has {use.short}" if use.short else ""
            lines.append(f"{use.bucket!s:>11} {use.images:>7} {use.samples:>7} {use.steps:>6}{short}")
        said = self.captions
        lines += [
            "",
            f"captions: {said.distinct} different, {said.missing} missing, {said.empty} empty; "
            f"{said.fewest_tokens} to {said.most_tokens} tokens, median {said.median_tokens:g}, "
            f"of {said.token_limit} that are read",
        ]
        topics: dict[tuple[str, str], list[Finding]] = defaultdict(list)
        for finding in self.findings:
            topics[finding.level, finding.topic].append(finding)
        for (level, _), alike in topics.items():
            lines.append("")
            for finding in alike[:SHOWN_PER_TOPIC]:
                lines.append(f"{level}: {f'{finding.file} ' if finding.file else ''}{finding.message}")
            if len(alike) > SHOWN_PER_TOPIC:
                lines.append(f"{level}: ... and {len(alike) - SHOWN_PER_TOPIC} more like these")
        return "\n".join(lines)


def lint(
    folder: ImageFolder,
    buckets: Sequence[Bucket],
    *,
    captions: Sequence[str],
    token_count: Callable[[str], int],
    token_limit: int,
    step_size: int,
    trigger: str | None = None,
) -> LintReport:
    """Look for what would make a training on a folder fail or disappoint.

    Findings: files that cannot be read; exact and near duplicates; images that are enlarged, or cropped by more than
    a third; files with several frames; captions that are missing, empty, contradictory, longer than the encoder
    reads, or whose trigger is cut off with the end; buckets that fill no step.

    Args:
        folder: the folder.
        buckets: sizes that are trained at.
        captions: of each record as the model reads it, with the trigger and without dropout.
        token_count: tokens of a text as the encoder counts them, those at the ends included.
        token_limit: tokens that the encoder reads, 77 for CLIP.
        step_size: samples of an optimiser step.
        trigger: the word that calls the adapter.
    """
    assigned = [choose_bucket(record.size, buckets) for record in folder.records]
    counts = [token_count(caption) for caption in captions]
    findings = [
        *folder.problems,
        *_duplicates(folder.records),
        *_geometry(folder.records, assigned),
        *_captions(folder.records, captions, counts, token_count, token_limit, trigger),
    ]
    uses = _bucket_uses(folder.records, assigned, step_size)
    findings += _short_buckets(uses, step_size)
    order = {"error": 0, "warning": 1, "note": 2}
    findings.sort(key=lambda finding: order[finding.level])
    statistics = CaptionStatistics(
        images=len(folder.records),
        missing=sum(record.caption is None for record in folder.records),
        empty=sum(record.caption == "" for record in folder.records),
        distinct=len(set(captions)),
        fewest_tokens=min(counts),
        median_tokens=median(counts),
        most_tokens=max(counts),
        token_limit=token_limit,
    )
    return LintReport(tuple(findings), uses, statistics)


def near_duplicates(records: Sequence[ImageRecord]) -> list[tuple[int, int]]:
    """List the pairs (i, j), i < j, of images that look alike; all pairs are compared, 10,000 images in seconds."""
    hashes = np.array([record.looks for record in records], dtype=np.uint64)
    thumbnails = np.array([list(record.thumbnail) for record in records], dtype=np.int16)
    pairs: list[tuple[int, int]] = []
    for first in range(len(records)):
        differing = np.bitwise_count(hashes[first + 1 :] ^ hashes[first])
        close = first + 1 + np.flatnonzero(differing <= NEAR_DUPLICATE_BITS)
        # Drawings on white share many bits of the hash by chance; the thumbnails decide.
        largest = np.abs(thumbnails[close] - thumbnails[first]).max(axis=1, initial=0)
        pairs += [(first, int(second)) for second in close[largest <= NEAR_DUPLICATE_DIFFERENCE]]
    return pairs


def _duplicates(records: Sequence[ImageRecord]) -> Iterator[Finding]:
    first_of: dict[str, ImageRecord] = {}
    distinct: list[ImageRecord] = []
    for record in records:
        original = first_of.setdefault(record.digest, record)
        if original is record:
            distinct.append(record)
        else:
            message = (
                f"is pixel for pixel the same as {original.name}; remove one, or use repeats if that is meant"
            )
            yield Finding("warning", record.name, message, "duplicate")
    alike: dict[int, list[int]] = defaultdict(list)
    for first, second in near_duplicates(distinct):
        alike[second].append(first)
    for second, earlier in alike.items():
        more = f" and {len(earlier) - 1} more" if len(earlier) > 1 else ""
        message = (
            f"looks nearly the same as {distinct[earlier[0]].name}{more}; the model sees it that much oftener"
        )
        yield Finding("warning", distinct[second].name, message, "near-duplicate")


def _geometry(records: Sequence[ImageRecord], assigned: Sequence[Bucket]) -> Iterator[Finding]:
    for record, bucket in zip(records, assigned, strict=True):
        width, height = record.size
        scale = max(Fraction(bucket.width, width), Fraction(bucket.height, height))
        lost = 1 - Fraction(bucket.width * bucket.height, width * height) / scale**2
        size = f"{width}x{height} pixels"
        if scale >= VISIBLE_ENLARGEMENT:
            message = (
                f"has only {size}, enlarged {float(scale):.1f} times to fill {bucket}; use a larger original"
            )
            yield Finding("warning", record.name, message, "enlarged")
        elif scale > 1:
            message = f"has {size}, enlarged a little ({float(scale):.2f} times) to fill {bucket}"
            yield Finding("note", record.name, message, "enlarged a little")
        if lost > CROP_SHARE:
            message = f"has {size}, {float(lost):.0%} of it cropped off to fill {bucket}; raise max_aspect or crop it"
            yield Finding("warning", record.name, message, "cropped")


def _captions(
    records: Sequence[ImageRecord],
    captions: Sequence[str],
    counts: Sequence[int],
    token_count: Callable[[str], int],
    token_limit: int,
    trigger: str | None,
) -> Iterator[Finding]:
    for record, caption, count in zip(records, captions, counts, strict=True):
        instead = f"it is trained with {caption!r}" if caption else "it is trained without text"
        if record.caption is None:
            message = f"has no caption; {instead}; write one beside it, or give data.caption for all"
            yield Finding("warning", record.name, message, "missing caption")
        elif not record.caption:
            yield Finding("warning", record.name, f"has an empty caption; {instead}", "empty caption")
        read = caption
        if count > token_limit:
            read, cut = _cut(caption, token_count, token_limit)
            message = f"has a caption {count - token_limit} tokens past the limit of {token_limit}; cut off is {cut!r}"
            yield Finding("warning", record.name, message, "long caption")
        if trigger and not contains_words(read, trigger):
            lost = "the end of the caption is cut off; shorten it, or set data.trigger_position to first"
            why = lost if contains_words(caption, trigger) else "its caption does not have it"
            yield Finding(
                "error", record.name, f"is trained without the trigger {trigger!r}: {why}", "trigger"
            )


def _cut(caption: str, token_count: Callable[[str], int], token_limit: int) -> tuple[str, str]:
    """Split a caption into the words that fit within the limit and those that do not."""
    words = caption.split()
    fits, too_many = 0, len(words)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if token_count(" ".join(words[:middle])) <= token_limit:
            fits = middle
        else:
            too_many = middle
    return " ".join(words[:fits]), " ".join(words[fits:])


def _bucket_uses(
    records: Sequence[ImageRecord], assigned: Sequence[Bucket], step_size: int
) -> tuple[BucketUse, ...]:
    images = Counter(assigned)
    samples: Counter[Bucket] = Counter()
    for record, bucket in zip(records, assigned, strict=True):
        samples[bucket] += record.repeats
    return tuple(
        BucketUse(
            bucket,
            images[bucket],
            samples[bucket],
            -(-samples[bucket] // step_size),
            samples[bucket] % step_size,
        )
        for bucket in sorted(images, key=lambda bucket: (Fraction(bucket.width, bucket.height), bucket.width))
    )


def _short_buckets(uses: Iterable[BucketUse], step_size: int) -> Iterator[Finding]:
    for use in uses:
        if 0 < use.samples < step_size:
            message = (
                f"bucket {use.bucket} has {use.samples} visits per epoch, fewer than a step's {step_size}: "
                "they are trained in a short step of their own, where each counts for more"
            )
            yield Finding("note", None, message, "short bucket")
