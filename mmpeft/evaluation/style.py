"""What a style adapter brings and what it costs: style, content, bleed and drift, each with an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from mmpeft.evaluation.bootstrap import interval
from mmpeft.evaluation.drift import drift
from mmpeft.evaluation.judges import PocketJudges

Interval = tuple[float, float]
Draw = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]
"""draws a picture for each prompt and seed"""


@dataclass(frozen=True)
class StyleScores:
    """Shares of pictures, 0 to 1, with 95 % bootstrap intervals over the captions."""

    style_before: float
    style_before_interval: Interval
    style_after: float
    style_after_interval: Interval
    content_before: float
    content_before_interval: Interval
    content_after: float
    content_after_interval: Interval
    bleed: float
    """style share on the same captions without the trigger"""
    bleed_interval: Interval
    drift: float
    """change of pictures that did not ask for the style: 0 none, 1 as different as another concept"""
    drift_interval: Interval
    pictures: int
    drift_prompts: int
    before: list[Image.Image] = field(repr=False)
    after: list[Image.Image] = field(repr=False)
    without_trigger: list[Image.Image] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Give the numbers without the pictures."""
        pictures = ("before", "after", "without_trigger")
        return {key: value for key, value in asdict(self).items() if key not in pictures}


def score_style(
    draw: Draw,
    with_adapter: Callable[[], AbstractContextManager[Any]],
    judges: PocketJudges,
    *,
    style: str,
    concepts: Sequence[str],
    trigger: str,
    drift_prompts: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2, 3),
) -> StyleScores:
    """Draw captions that the adapter never saw, with and without it, from the same seeds, and let judges look.

    Args:
        draw: draws with whatever adapter is on.
        with_adapter: a context in which the adapter is on; outside it the base draws alone.
        judges: the pocket judges.
        style: one of `mmpeft.evaluation.judges.STYLES`.
        concepts: names that the concept judge knows; none may be in the training captions.
        trigger: joined to a concept with ", ".
        drift_prompts: prompts without the trigger, each drawn once.
        seeds: pictures of each concept.
    """
    named = [concept for concept in concepts for _ in seeds]
    numbers = [seed * len(concepts) + place for place in range(len(concepts)) for seed in seeds]
    asked = [f"{concept}, {trigger}" for concept in named]
    drift_seeds = list(range(1000, 1000 + len(drift_prompts)))
    before, undisturbed = draw(asked, numbers), draw(drift_prompts, drift_seeds)
    with with_adapter():
        after, plain, disturbed = draw(asked, numbers), draw(named, numbers), draw(drift_prompts, drift_seeds)

    def share(hits: Sequence[bool]) -> tuple[float, Interval]:
        return round(sum(hits) / len(hits), 4), interval(hits, groups=named)

    style_before, style_after = share(judges.style_is(before, style)), share(judges.style_is(after, style))
    content_before, content_after = (
        share(judges.content_is(before, named)),
        share(judges.content_is(after, named)),
    )
    bleed, moved = share(judges.style_is(plain, style)), drift(disturbed, undisturbed)
    return StyleScores(
        *style_before, *style_after, *content_before, *content_after, *bleed, *moved,
        pictures=len(asked), drift_prompts=len(drift_prompts),
        before=before, after=after, without_trigger=plain,
    )  # fmt: skip
