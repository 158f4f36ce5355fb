"""From the caption beside an image to the text that the encoder reads at one visit."""

import re
from typing import Literal

import torch

from mmpeft import randomness


def final_caption(
    caption: str | None,
    *,
    trigger: str | None,
    trigger_position: Literal["first", "last"],
    dropout: float,
    shuffle_tags: bool,
    keep_tags: int,
    seed: int,
    epoch: int,
    index: int,
) -> str:
    """Say what the model reads for one sample at one visit.

    Dropout comes first and takes the trigger along: the model must also know what to draw without text, for
    guidance. Then the tags (what stands between commas) are shuffled, the first `keep_tags` staying in their place;
    then the trigger is joined with ", " unless its words already stand in the caption, whatever their case.

    Args:
        caption: as it stands beside the image; None is like "".
        trigger: word or words that call the adapter; None or "" adds nothing.
        trigger_position: at which end the trigger is joined.
        dropout: probability of "", 0 to 1.
        shuffle_tags: whether the order of the tags is drawn anew.
        keep_tags: tags at the start that are not shuffled.
        seed: of the run.
        epoch: visit, from 0.
        index: of the sample in the epoch's list.
    """
    generator = randomness.generator(seed, "caption", epoch, index)
    if torch.rand((), generator=generator).item() < dropout:
        return ""
    text = (caption or "").strip()
    if shuffle_tags:
        tags = [tag.strip() for tag in text.split(",") if tag.strip()]
        kept, loose = tags[:keep_tags], tags[keep_tags:]
        order = torch.randperm(len(loose), generator=generator).tolist()
        text = ", ".join([*kept, *(loose[place] for place in order)])
    if not trigger or contains_words(text, trigger):
        return text
    parts = [trigger, text] if trigger_position == "first" else [text, trigger]
    return ", ".join(part for part in parts if part)


def contains_words(text: str, words: str) -> bool:
    """Tell whether words stand in a text as whole words, in this order, whatever their case and spacing."""
    return _whole_words(words).search(text) is not None


def without_words(text: str, words: str) -> str:
    """Take words out of a text, as `contains_words` finds them, and the comma that they leave behind."""
    if not words:
        return text
    parts = [" ".join(_whole_words(words).sub(" ", part).split()) for part in text.split(",")]
    return ", ".join(part for part in parts if part)


def _whole_words(words: str) -> re.Pattern[str]:
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    return re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE)
