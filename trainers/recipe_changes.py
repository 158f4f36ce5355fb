"""What may change in a recipe when a run is resumed."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from mmpeft.errors import ConfigError

# Setting (with * and ?) -> what the change means. Every other change would make another run of it.
MAY_CHANGE = {
    "out": "",
    "train.checkpoint_every": "",
    "train.keep_checkpoints": "",
    "train.tracker": "",
    "preview.*": "",
    "validation.every": "best is chosen among the steps that are looked at",
    "train.learning_rate": "from here on; the run no longer equals one with either value throughout",
    "train.max_grad_norm": "from here on; the run no longer equals one with either value throughout",
    "components.*.learning_rate": "from here on; the run no longer equals one with either value throughout",
    "base.attention": "same mathematics, other rounding",
    "base.precision": "same mathematics, other rounding",
    "base.gradient_checkpointing": "same mathematics, other rounding",
    "base.channels_last": "same mathematics, other rounding",
    "base.compile": "same mathematics, other rounding",
}
_GEOMETRY = ("train.batch_size", "train.accumulate", "train.processes")


class Change(NamedTuple):
    """One setting that differs between two recipes."""

    key: str
    old: Any
    new: Any
    allowed: bool
    note: str
    """what it means, or why it is refused"""

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}" + (f" ({self.note})" if self.note else "")


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Compare two recipes, dotted and in JSON values, setting by setting, in the order of their names."""
    differing = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return [Change(key, old.get(key), new.get(key), *_judge(key, old, new)) for key in differing]


def require_resumable(found: list[Change]) -> None:
    """Refuse changes that would make another run of it.

    Raises:
        ConfigError: names each of them.
    """
    refused = [change for change in found if not change.allowed]
    if refused:
        raise ConfigError(
            "this recipe cannot go on from that checkpoint: "
            + "; ".join(map(str, refused))
            + ". Take the old values back, or begin a new run in another out"
        )


def _judge(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[bool, str]:
    if key == "train.steps":
        if new[key] < old[key]:
            return False, "may only grow"
        if new.get("train.schedule") == "constant":
            note = "the learning rate stays constant"
        else:
            note = "the learning rate jumps to where the longer schedule is at this step, and ends at 0 anew"
        if any(name.endswith(".stop_after") and value < 1 for name, value in new.items()):
            note += "; stop_after counts from the new number, so what had stopped may learn again"
        return True, note
    if key in _GEOMETRY:
        sizes = [_step_size(recipe) for recipe in (old, new)]
        if sizes[0] == sizes[1]:
            return True, f"the step keeps its {sizes[1]} samples; other rounding"
        return False, f"a step would have {sizes[1]} samples instead of {sizes[0]}"
    for pattern, note in MAY_CHANGE.items():
        if fnmatchcase(key, pattern):
            return True, note
    return False, "another value makes another run"


def _step_size(recipe: Mapping[str, Any]) -> int:
    size = 1
    for key in _GEOMETRY:
        size *= recipe.get(key, 1)
    return size
