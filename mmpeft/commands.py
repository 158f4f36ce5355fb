"""The commands: each calls one function of the library and prints what it returns."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from mmpeft import plugins
from mmpeft.config import PLUGIN_SECTIONS, Settings, flags_type, read_toml
from mmpeft.errors import ConfigError


def recipe_command(verb: str, tokens: Sequence[str]) -> Callable[..., None]:
    """Make the train or plan command with the flags of the plugins that the command line chooses."""
    chosen = {}
    for section in PLUGIN_SECTIONS:
        for at, token in enumerate(tokens):
            if token.startswith(f"--{section}.name="):
                chosen[section] = token.split("=", 1)[1]
            elif token == f"--{section}.name" and at + 1 < len(tokens):
                chosen[section] = tokens[at + 1]
    for token in tokens[1:]:
        if token.endswith(".toml") and not token.startswith("-"):
            for section, settings in read_toml(Path(token)).items():
                if section in PLUGIN_SECTIONS and "name" in settings:
                    chosen.setdefault(section, settings["name"])
    command = _train if verb == "train" else _plan
    command.__annotations__["flags"] = Annotated[flags_type(chosen) | None, Parameter(name="*")]
    return command


def _train(
    source: Path,
    /,
    *,
    out: Path | None = None,
    preset: str | None = None,
    resume: bool = False,
    flags: Settings | None = None,
) -> None:
    """Train an adapter from a folder of images or a recipe.

    Parameters
    ----------
    source:
        A folder of images, or a recipe (.toml).
    out:
        Folder of the run: checkpoints/, adapter/, previews and curves.
    preset:
        Settings to start from: style or subject.
    resume:
        Go on from the newest checkpoint in the folder of the run.
    """
    from mmpeft.trainers import launch
    from mmpeft.trainers.presets import resolve

    recipe = resolve(source, out=out, preset=preset, overrides=_given(flags))
    if recipe.train.processes > 1 and not launch.is_rank():
        sys.exit(launch.run_processes(sys.argv[1:], recipe.train.processes))
    from mmpeft.trainers.training import train

    result = train(recipe, resume=resume)
    if launch.is_main():
        print(result.text())
    if result.stopped_by:
        sys.exit(128 + result.stopped_by)
    if not result.verified:
        sys.exit(1)


def _plan(
    source: Path,
    /,
    *,
    out: Path | None = None,
    preset: str | None = None,
    measure: bool = False,
    flags: Settings | None = None,
) -> None:
    """Look at data and cost before training: nothing is trained.

    Parameters
    ----------
    source:
        A folder of images, or a recipe (.toml).
    out:
        Where the contact sheet and the report go.
    preset:
        Settings to start from: style or subject.
    measure:
        Time one step per bucket instead of estimating.
    """
    from mmpeft.trainers.plan import plan
    from mmpeft.trainers.presets import resolve

    report = plan(
        resolve(source, out=out or Path("runs/plan"), preset=preset, overrides=_given(flags)), measure=measure
    )
    print(report.text())
    if report.errors:
        sys.exit(1)


def generate(
    prompts: Annotated[list[str], Parameter(negative="")],
    /,
    *,
    base: str = "pocket",
    adapter: Annotated[list[str], Parameter(negative="")] = [],  # noqa: B006 - cyclopts reads it, nobody writes it
    grid: Annotated[list[float], Parameter(negative="")] = [],  # noqa: B006
    negative: str = "",
    seed: int = 0,
    steps: int = 20,
    guidance: float = 4.0,
    width: int | None = None,
    height: int | None = None,
    out: Path = Path("generated.png"),
) -> None:
    """Draw pictures with adapters mixed at given weights.

    Parameters
    ----------
    prompts:
        One picture each.
    base:
        pocket, a folder, a .safetensors file, or a hub name.
    adapter:
        A folder or file, with its weight if it is not 1: --adapter runs/ink/adapter=0.8; may be given several times.
    grid:
        Draw every prompt at each of these weights of the first adapter (and, with two adapters, of both).
    negative:
        What the pictures should not show.
    seed:
        Of the first picture; the next prompts take the next seeds.
    """
    from mmpeft.generation import draw_grid

    weights = [_path_and_weight(text) for text in adapter]
    sheet = draw_grid(
        prompts,
        adapters=weights,
        base=base,
        grid=grid,
        negative_prompt=negative,
        seed=seed,
        steps=steps,
        guidance=guidance,
        width=width,
        height=height,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    print(f"wrote {out} ({sheet.width} x {sheet.height})")


def inspect(
    path: Path, /, *, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False
) -> None:
    """Say what is in an adapter: method, ranks, alphas, norms, base, health.

    Parameters
    ----------
    path:
        A folder or a .safetensors file.
    as_json:
        Print JSON instead of a table.
    """
    from mmpeft.inspection import inspect as look

    report = look(path)
    print(json.dumps(report.as_dict(), indent=2) if as_json else report.text())


def doctor() -> None:
    """Say what works on this machine, and how to get the rest."""
    from mmpeft.doctor import examine

    print(examine().text())


def plugins_command(kind: str | None = None, /) -> None:
    """List methods, backbones, objectives and datasets.

    Parameters
    ----------
    kind:
        method, backbone, objective or dataset; all of them when left out.
    """
    if kind is not None and kind not in plugins.kinds():
        raise ConfigError(f"no plugin kind is called {kind!r}{plugins.near_miss(kind, plugins.kinds())}")
    for each in [kind] if kind else plugins.kinds():
        print(f"{each}: {', '.join(plugins.names(each))}")


def quickstart(*, out: Path = Path("runs/quickstart")) -> None:
    """Train a style adapter and a second one on the embedded base, mix them, fuse them, and measure it all.

    Parameters
    ----------
    out:
        Where adapter/, before_after.png and report.json go.
    """
    from mmpeft.trainers.quickstart import quickstart as run

    print(run(out))


def _given(flags: Settings | None) -> dict[str, Any]:
    return flags.model_dump(exclude_unset=True) if flags else {}


def _path_and_weight(text: str) -> tuple[Path, float]:
    path, equals, weight = text.rpartition("=")
    if not equals:
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise ConfigError(f"--adapter {text}: the weight after = must be a number; got {weight!r}") from None
