"""What is known about an adapter besides its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AdapterCard:
    """What is known about an adapter besides its weights; written as adapter.json.

    Only digests stand for what lay on the user's machine: no caption, file name or path.
    """

    base: str = ""
    fingerprint: Mapping[str, Any] | None = None
    data_digest: str | None = None
    trigger: str | None = None
    seed: int | None = None
    steps: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    preview: Mapping[str, Any] = field(default_factory=dict)
    embedding: Sequence[float] | None = None
    """mean of the training captions in the base's text encoder, as `mmpeft.routing` makes it; routes prompts"""
    parents: tuple[Mapping[str, Any], ...] = ()
