"""The commands about several adapters: each calls one function of the library and prints what it returns."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field, create_model

from mmpeft.commands import path_and_blocks
from mmpeft.config import Settings
from mmpeft.errors import ConfigError

_Json = Annotated[bool, Parameter(name="--json", negative="")]


def compose_command(tokens: Sequence[str]) -> Callable[..., None]:
    """Make the compose command with the settings of the strategy that the command line chooses."""
    chosen = "sum"
    for at, token in enumerate(tokens):
        if token.startswith("--strategy="):
            chosen = token.split("=", 1)[1]
        elif token == "--strategy" and at + 1 < len(tokens):
            chosen = tokens[at + 1]
    settings = _settings_type(chosen)
    # a type without a field would be shown as a flag of its own
    shown = Parameter(name="*") if settings.model_fields else Parameter(parse=False)
    _compose.__annotations__["flags"] = Annotated[settings | None, shown]
    return _compose


def _settings_type(strategy: str) -> type[Settings]:
    """Derive the type behind a strategy's flags from its signature and docstring."""
    from mmpeft import plugins
    from mmpeft.composition.strategy import settings_of

    fields: dict[str, Any] = {
        setting.name: (setting.type, Field(setting.default, description=setting.says))
        for setting in settings_of(plugins.get("strategy", strategy))
        if setting.name not in ("rank", "error")
    }
    return create_model("StrategySettings", __base__=Settings, **fields)


def _compose(
    adapters: tuple[str, ...],
    /,
    *,
    out: Path,
    strategy: str | None = None,
    rank: int | None = None,
    error: float | None = None,
    seed: int | None = None,
    base: str | None = None,
    like: Path | None = None,
    as_json: _Json = False,
    flags: Settings | None = None,
) -> None:
    """Compose adapters into a new adapter.

    Parameters
    ----------
    adapters:
        Folders or files, each with its weight if it is not 1: runs/ink/adapter=0.8, or by component or block:
        'runs/cat/adapter={"unet": {"down": 0.2, "up": 0.9}}'.
    out:
        The new adapter's folder.
    strategy:
        How; mmpeft plugins strategy lists them, and each has settings of its own. sum when left out.
    rank:
        The most that a layer's rank may be.
    error:
        The largest relative error of a layer, at which its rank is chosen: 0.1 for 10 %.
    seed:
        Of strategies that draw; 0 when left out.
    base:
        The model's folder, or pocket; needed by methods whose change depends on the base's weights (DoRA, OFT, (IA)³).
    like:
        A composed adapter: compose the same again from its parents, given in any order without weights.
    as_json:
        Print JSON instead of the report.
    """  # noqa: D405, D411 - a parameter called error is no section
    from mmpeft.composition.compose import DifferentBasesWarning, compose, replay

    # the report says it
    warnings.simplefilter("ignore", DifferentBasesWarning)
    settings = flags.model_dump(exclude_unset=True) if flags else {}
    pairs = [path_and_blocks(text) for text in adapters]
    for path, _ in pairs:
        if path.exists() and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise ConfigError(f"--out {out} would replace {path}, which is composed; choose another folder")
    if like is None:
        adapter, report = compose(
            pairs, strategy or "sum", rank=rank, error=error, seed=seed or 0, base=base, **settings
        )
    else:
        if any(given is not None for given in (strategy, rank, error, seed)) or settings:
            raise ConfigError(f"--like {like} decides strategy, settings and weights; leave yours out")
        if weighted := [text for text in adapters if "=" in text and not Path(text).exists()]:
            raise ConfigError(f"--like {like} decides the weights; leave out that of {weighted[0]}")
        adapter, report = replay(like, adapters, base=base)
    adapter.save(out)
    print(json.dumps(report.as_dict(), indent=2) if as_json else f"{report.text()}\nwrote {out}")


def interference(
    adapters: tuple[Path, ...],
    /,
    *,
    base: str | None = None,
    layers: Annotated[bool, Parameter(negative="")] = False,
    picture: Path | None = None,
    as_json: _Json = False,
) -> None:
    """Measure what adapters would do to each other: shared directions, opposing signs, strengths.

    Parameters
    ----------
    adapters:
        At least two folders or files.
    base:
        The model's folder, or pocket; needed by methods whose change depends on the base's weights.
    layers:
        Show every layer instead of blocks.
    picture:
        Write a heat map of the blocks there.
    as_json:
        Print JSON instead of tables.
    """
    from mmpeft.composition.interference import interference as measure
    from mmpeft.picture_grid import check_place, save_picture

    if picture is not None:
        check_place(picture)
    found = measure(adapters, base=base)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print(found.table() if layers else found.text())
    if picture is not None:
        save_picture(found.picture(), picture)
        if not as_json:
            print(f"wrote {picture}")


def compare(a: Path, b: Path, /, *, base: str | None = None, as_json: _Json = False) -> None:
    """Say how far apart two adapters' changes are, layer by layer.

    Parameters
    ----------
    a:
        A folder or a file.
    b:
        Another.
    base:
        The model's folder, or pocket; needed by methods whose change depends on the base's weights.
    as_json:
        Print JSON instead of a table.
    """
    from mmpeft.comparison import compare as measure

    found = measure(a, b, base=base)
    print(json.dumps(found.as_dict(), indent=2) if as_json else found.text())
