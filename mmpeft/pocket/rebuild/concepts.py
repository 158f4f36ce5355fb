"""Which concepts the pocket base is made of: their names, codes and keywords."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from mmpeft.errors import ConfigError, DataError

Tier = Literal["taught", "familiar", "named"]
"""taught: what the denoiser draws; familiar: common drawings, which weigh more in CLIP; named: all the others"""

HELD_OUT = (
    "red apple", "cat face", "rocket", "pizza", "soccer ball", "crying face", "automobile", "strawberry",
    "panda", "tulip", "hamburger", "ghost", "frog", "house", "key", "birthday cake",
)  # fmt: skip
"""taught concepts that no style folder trains on and the style judge never sees: adapters are judged by them"""

STYLE_TRAIN = (
    "alien", "hammer", "light bulb", "flying saucer", "police car", "wrapped gift", "gem stone",
    "koala", "grinning face", "lady beetle", "fox", "sailboat", "green apple", "fire", "fire engine",
    "delivery truck", "guitar", "tent", "top hat", "pencil", "mouse face", "rabbit face", "lemon",
    "cactus", "spouting whale", "droplet", "crescent moon", "bell", "bread", "maple leaf", "locked",
    "four leaf clover", "grapes", "bus", "hatching chick", "hot dog", "soft ice cream", "peach",
    "smiling face with heart eyes", "trophy",
)  # fmt: skip
"""taught concepts that every style folder trains on, in the order of its files"""

CAT_TRAIN = {
    "grinning cat": "a sks cat, grinning",
    "grinning cat with smiling eyes": "a sks cat, grinning with smiling eyes",
    "cat with tears of joy": "a sks cat with tears of joy",
    "smiling cat with heart eyes": "a sks cat with heart eyes",
    "cat with wry smile": "a sks cat with wry smile",
    "kissing cat": "a sks cat, kissing",
}
"""concept -> caption of the expressions that the cat folder trains on"""
CAT_HELD_OUT = {
    "weary cat": "a sks cat, weary",
    "crying cat": "a sks cat, crying",
    "pouting cat": "a sks cat, pouting, angry",
}
"""concept -> caption of the expressions that are kept for judging"""


@dataclass(frozen=True)
class Concept:
    """One thing that the packages draw."""

    name: str
    """lower-case words, such as "red apple"; what captions and judges call it"""
    code: str
    """hexadecimal code points joined by "-", lower case, without variation selectors"""
    keywords: tuple[str, ...]
    """words that go with it, other than its name"""
    also_called: tuple[str, ...]
    """everyday names that may stand in for `name`"""
    tier: Tier
    is_person: bool
    """people and parts of bodies, which are never painted in another colour"""


@cache
def _names() -> dict[str, Tier]:
    listed = json.loads(Path(__file__).with_name("concepts.json").read_text())
    return {name: tier for tier in ("taught", "familiar", "named") for name in listed[tier]}


@cache
def _also_called() -> dict[str, tuple[str, ...]]:
    listed = json.loads(Path(__file__).with_name("concepts.json").read_text())
    return {name: tuple(others) for name, others in listed["also_called"].items()}


def chosen_names(taught: int | None = None) -> dict[str, Tier]:
    """List the concepts of a rebuild.

    Args:
        taught: how many taught concepts a small rebuild has, half of them (at most 16) from `HELD_OUT`, the
            others from `STYLE_TRAIN` first; it also has the cat's nine expressions. None means all 1,142 concepts.

    Raises:
        ConfigError: `taught` is not between 4 and 219.
    """
    names = _names()
    if taught is None:
        return names
    every = [name for name, tier in names.items() if tier == "taught"]
    if not 4 <= taught <= len(every):
        raise ConfigError(f"concepts: must be between 4 and {len(every)}; got {taught}")
    held = HELD_OUT[: taught // 2]
    others = dict.fromkeys([*STYLE_TRAIN, *(name for name in every if name not in HELD_OUT)])
    kept = {*held, *list(others)[: taught - len(held)], *CAT_TRAIN, *CAT_HELD_OUT}
    return {name: tier for name, tier in names.items() if name in kept}


def read_concepts(packages: Path, taught: int | None = None) -> list[Concept]:
    """Read the chosen concepts, in the order of emojibase, which is the order of the concept judge's classes.

    Args:
        packages: folder that holds `emojibase-data` and `emojilib`.
        taught: see `chosen_names`.

    Raises:
        DataError: a chosen concept is not in the packages.
    """
    names = chosen_names(taught)
    entries = json.loads((packages / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    more = json.loads((packages / "emojilib/dist/emoji-en-US.json").read_text(encoding="utf-8"))
    found = []
    for entry in entries:
        label = entry["label"].lower().replace("’", "'").replace("“", "").replace("”", "")
        name = re.sub("[:,.!]", "", label.replace("-", " ")).strip()
        if name in names:
            emoji = entry["emoji"]
            others = more.get(emoji) or more.get(emoji.replace("\ufe0f", "")) or []
            found.append(
                Concept(
                    name=name,
                    code=plain_code(entry["hexcode"]),
                    keywords=_keywords(label, [*entry.get("tags", []), *others[1:]]),
                    also_called=_also_called().get(name, ()),
                    tier=names[name],
                    is_person=entry["group"] == 1,  # emojibase: people and body
                )
            )
    if missing := sorted(names.keys() - {concept.name for concept in found}):
        raise DataError(f"{packages / 'emojibase-data'} does not name {missing}; is it another version?")
    return found


def plain_code(code: str) -> str:
    """Write a code in one way: lower case, without the variation selector, which packages set at will."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _keywords(label: str, words: list[str]) -> tuple[str, ...]:
    plain = dict.fromkeys(word.replace("_", " ").lower() for word in words)  # in order, each once
    return tuple(w for w in plain if re.fullmatch(r"[a-z][a-z '-]*", w) and w != label and len(w) < 22)
