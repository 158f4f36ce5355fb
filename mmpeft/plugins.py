"""Registries: one door for the built-in and for strangers' methods, backbones, objectives, datasets and strategies.

A package adds its own through the entry point group "mmpeft.plugins": each entry point names a function
that takes no argument and calls `register` for what it brings.
"""

import difflib
import importlib
from importlib.metadata import entry_points
from typing import Any

from mmpeft.errors import ConfigError

# Built-ins are named by place and imported when first asked for, so that a look at the list costs nothing.
_BUILT_IN: dict[str, dict[str, str]] = {
    "method": {
        "lora": "mmpeft.methods.lora:Lora",
        "dora": "mmpeft.methods.dora:Dora",
    },
    "backbone": {
        "stable_diffusion": "mmpeft.backbones.stable_diffusion:StableDiffusion",
    },
    "dataset": {
        "image_folder": "mmpeft.data.image_folder:ImageFolder",
    },
    "objective": {
        "denoise": "mmpeft.diffusion.denoise:Denoise",
    },
    "strategy": {
        "sum": "mmpeft.composition.sum:weighted_sum",
        "svd": "mmpeft.composition.svd:truncated_sum",
        "ties": "mmpeft.composition.ties:ties",
        "dare": "mmpeft.composition.dare:dare",
        "dare_ties": "mmpeft.composition.dare:dare_ties",
        "magnitude": "mmpeft.composition.magnitude:magnitude",
        "slerp": "mmpeft.composition.slerp:slerp",
        "knots": "mmpeft.composition.knots:knots",
        "orthogonal": "mmpeft.composition.orthogonal:orthogonal",
        "zip": "mmpeft.composition.zip:zip_columns",
    },
}
_registered: dict[str, dict[str, Any]] = {kind: {} for kind in _BUILT_IN}
_entry_points_loaded = False


def register(kind: str, name: str, plugin: Any) -> None:
    """Add a plugin under a name that a recipe can say.

    Args:
        kind: "method", "backbone", "dataset", "objective" or "strategy".
        plugin: the class, or for a strategy the function; its contract is in the `base.py` of the kind's folder, or in
            `mmpeft/composition/compose.py`.

    Raises:
        ConfigError: the kind is unknown, or the name is taken.
    """
    if kind not in _registered:
        raise ConfigError(f"no plugin kind is called {kind!r}{near_miss(kind, list(_registered))}")
    if name in _registered[kind] or name in _BUILT_IN[kind]:
        raise ConfigError(f"a {kind} called {name!r} is already registered; choose another name")
    _registered[kind][name] = plugin


def get(kind: str, name: str) -> Any:
    """Look up a plugin by kind and name.

    Raises:
        ConfigError: nothing has this name; close names are suggested.
    """
    _load_entry_points()
    if name in _registered[kind]:
        return _registered[kind][name]
    if name in _BUILT_IN[kind]:
        module, attribute = _BUILT_IN[kind][name].split(":")
        return getattr(importlib.import_module(module), attribute)
    raise ConfigError(f"no {kind} is called {name!r}{near_miss(name, names(kind))}")


def names(kind: str) -> list[str]:
    """List the names of a kind, sorted; nothing is imported but what strangers' entry points need."""
    _load_entry_points()
    return sorted({*_BUILT_IN[kind], *_registered[kind]})


def kinds() -> list[str]:
    """List the kinds of plugins."""
    return list(_BUILT_IN)


def near_miss(given: str, known: list[str]) -> str:
    """Word the end of an error for a name that is unknown: a close name, or all of them."""
    close = difflib.get_close_matches(given, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(map(repr, sorted(known)))}" if known else ""


def _load_entry_points() -> None:
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for point in entry_points(group="mmpeft.plugins"):
        point.load()()
