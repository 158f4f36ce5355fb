"""From what a person says to a recipe: a folder or a file, a preset, and settings laid over both.

A preset is a recipe file in recipes/; its tables under [for.<base>] hold what differs on one base.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpeft.config import Recipe, nested, read_toml
from mmpeft.errors import ConfigError
from mmpeft.plugins import near_miss

_FOLDER = Path(__file__).parent / "recipes"


def names() -> list[str]:
    """List the presets."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def resolve(
    source: Recipe | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """Build the recipe that a source, a preset and overrides mean together; the later ones win.

    Args:
        source: a folder of images, a recipe file, nested or dotted settings, or a Recipe.
        out: folder of the run; runs/<name of the folder or file> when nobody says it.
        preset: a name from `names()`; a recipe file may say `preset = "style"` itself.
        overrides: nested or dotted settings.

    Raises:
        ConfigError: no such folder, file, preset or setting, or a value that is not allowed.
    """
    if isinstance(source, Recipe):
        source = source.dotted()
        given, name = nested(source), "run"
    elif isinstance(source, Mapping):
        given, name = nested(source), "run"
    else:
        given, name = _read(Path(source))
    over = nested(overrides or {})
    preset = preset or given.pop("preset", None)
    layers = [given, over] if preset is None else [*_preset(preset, given, over), given, over]
    if out is not None:
        layers.append({"out": str(out)})
    return Recipe.build({"out": f"runs/{name}"}, *layers)


def _read(path: Path) -> tuple[dict[str, Any], str]:
    if path.suffix == ".toml":
        return nested(read_toml(path)), path.stem
    if path.is_dir():
        return {"data": {"images": str(path)}}, path.resolve().name
    if path.exists():
        raise ConfigError(f"{path} is a file; give a folder of images or a recipe that ends in .toml")
    raise ConfigError(f"there is no folder or recipe {path}")


def _preset(preset: str, *above: Mapping[str, Any]) -> list[dict[str, Any]]:
    if preset not in names():
        raise ConfigError(f"no preset is called {preset!r}{near_miss(preset, names())}")
    settings = read_toml(_FOLDER / f"{preset}.toml")
    by_base = settings.pop("for", {})
    base = "pocket"
    for layer in above:
        base = layer.get("base", {}).get("name", base)
    return [settings, by_base.get(base, {})]
