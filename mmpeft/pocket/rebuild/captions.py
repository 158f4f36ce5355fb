"""Write the captions that the pocket base learns from."""

import numpy as np

from mmpeft.pocket.rebuild.colours import BACKGROUNDS, COLOUR_WORDS, PAINTS
from mmpeft.pocket.rebuild.concepts import Concept

# Words that adapters' captions and prompts are likely to use: each becomes few tokens, though the base does not
# know what it looks like.
LIKELY_WORDS = (
    "a photo of", "a picture of", "an icon of", "in the style of", "3d", "shiny", "flat", "outline", "black and white",
    "high contrast", "sketch", "watercolor", "pixel art", "sticker", "logo", "small", "big", "two", "three", "happy",
    "sad", "with", "and", "the", "his", "her", "of", "wearing", "holding", "cute", "style",
)  # fmt: skip


def caption(
    concept: Concept,
    draw: np.random.Generator,
    *,
    painted: str | None = None,
    background: str | None = None,
    own: str | None = None,
) -> str:
    """Write one of the captions that fit a picture, each time another.

    Half are the bare name ("rocket"); the others "a rocket", "an icon of a rocket", "a rocket emoji" and
    "rocket, space, launch".

    Args:
        painted: the colour word that the drawing was painted in; it replaces colour words of the name.
        background: the colour word of a background that is not white.
        own: the colour word of the drawing as it is, which is said now and then.
    """
    name = concept.name
    if concept.also_called and draw.random() < 0.35:
        name = str(draw.choice(concept.also_called))
    if painted:
        name = f"{painted} {_colourless(name)}"
    elif own and not _has_colour(name) and draw.random() < 0.15:
        name = f"{own} {name}"
    text = _phrase(name, [word for word in concept.keywords if not _has_colour(word)], draw)
    return f"{text} on a {background} background" if background else text


def _phrase(name: str, keywords: list[str], draw: np.random.Generator) -> str:
    choice = draw.random()
    article = "an" if name[0] in "aeiou" else "a"
    if choice < 0.5:
        return name
    if choice < 0.7:
        return f"{article} {name}"
    if choice < 0.78:
        return f"an icon of {article} {name}"
    if choice < 0.86:
        return f"{article} {name} emoji"
    if not keywords:
        return name
    return ", ".join([name, *draw.permutation(keywords)[: draw.integers(1, 3)]])


def corpus(concepts: list[Concept], draw: np.random.Generator) -> list[str]:
    """Write the texts that the tokenizer is fitted on: captions, names, keywords and likely words."""
    texts = []
    for concept in concepts:
        for index in range(12):
            painted = str(draw.choice(PAINTS)) if index % 4 == 0 else None
            background = str(draw.choice(list(BACKGROUNDS))) if index % 6 == 0 else None
            texts.append(caption(concept, draw, painted=painted, background=background))
        texts += [concept.name] * 3 + list(concept.keywords)
    return texts + list(LIKELY_WORDS) * 40


def _has_colour(text: str) -> bool:
    return not COLOUR_WORDS.isdisjoint(text.split())


def _colourless(name: str) -> str:
    return " ".join(word for word in name.split() if word not in COLOUR_WORDS) or name
