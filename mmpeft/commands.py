"""The commands: each calls one function of the library and prints what it returns."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from pydantic import create_model

from mmpeft import plugins
from mmpeft.config import PLUGIN_SECTIONS, BaseSettings, Settings, flags_type, read_toml
from mmpeft.errors import ConfigError


def recipe_command(verb: str, tokens: Sequence[str]) -> Callable[..., None]:
    """Make the train or plan command with the flags of the plugins that the command line chooses."""
    chosen: dict[str, str] = {}
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
    command.__annotations__["flags"] = Annotated[
        _in_panels(flags_type(chosen), tokens) | None, Parameter(name="*")
    ]
    return command


def _in_panels(flags: type[Settings], tokens: Sequence[str]) -> type[Settings]:
    """Give each section of the recipe a panel of its own in the help, and list all plugins of a section."""
    if not {"--help", "-h"} & set(tokens):
        return flags
    fields: dict[str, Any] = {}
    for place, (name, field) in enumerate(flags.model_fields.items()):
        annotation: Any = field.annotation
        if name in PLUGIN_SECTIONS:
            kind = PLUGIN_SECTIONS[name][0]
            choice = annotation.model_fields["name"]
            says = f"which {kind}: {', '.join(plugins.names(kind))}; each has settings of its own"
            literal: Any = choice.annotation
            annotated: Any = Annotated[literal, Parameter(help=says, show_choices=False)]
            annotation = create_model(
                annotation.__name__,
                __base__=annotation,
                __module__=annotation.__module__,
                name=(annotated, choice),
            )
        if name == "components" or (isinstance(annotation, type) and issubclass(annotation, Settings)):
            panel = Group(name.capitalize(), sort_key=place)
            fields[name] = (Annotated[annotation, Parameter(group=panel)], field)
    return create_model("Flags", __base__=flags, **fields)


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
    # torchrun and its kin, this launcher among them, number their processes.
    rank = os.environ.get("RANK")
    if recipe.train.processes > 1 and rank is None:
        sys.exit(launch.run_processes(["-m", "mmpeft.cli", *sys.argv[1:]], recipe.train.processes))
    from mmpeft.trainers.training import train

    result = train(recipe, resume=resume)
    if not int(rank or 0):
        print(result.text())
    sys.exit(128 + result.stopped_by if result.stopped_by else int(result.verified is False))


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
    prompts: tuple[str, ...],
    /,
    *,
    base: str = "pocket",
    base_config: Path | None = None,
    adapter: Annotated[tuple[str, ...], Parameter(show_default=False)] = (),
    grid: Annotated[str, Parameter(show_default=False)] = "",
    negative: Annotated[str, Parameter(show_default=False)] = "",
    seed: int = 0,
    steps: int = 20,
    guidance: float = 4.0,
    width: int | None = None,
    height: int | None = None,
    attention: Literal["auto", "sdpa", "xformers", "flash", "sliced", "eager"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    out: Path = Path("generated.png"),
) -> None:
    """Draw pictures with adapters mixed at given weights.

    Parameters
    ----------
    prompts:
        One picture each.
    base:
        pocket, a folder, a .safetensors file, or a hub name.
    base_config:
        Folder with the model's configuration, for a single-file base without a hub.
    adapter:
        A folder or file, with its weight if it is not 1: --adapter runs/ink/adapter=0.8; may be given several times.
    grid:
        Weights to compare, such as 0,0.5,1: of one adapter for every prompt, or of two adapters for one prompt.
    negative:
        What the pictures should not show.
    seed:
        Of the first picture; the next prompts take the next seeds.
    steps:
        Denoising steps.
    guidance:
        How closely to follow the prompt (classifier-free guidance); 1 is without.
    width:
        Pixels; the base's own when left out.
    height:
        Pixels; the base's own when left out.
    attention:
        Memory-efficient attention; auto takes the best that works here.
    precision:
        What the base computes in.
    out:
        The picture, or the sheet of pictures.
    """  # noqa: D405, D411 - a parameter called attention is no section
    from mmpeft.generation import draw_grid
    from mmpeft.picture_grid import check_place, save_picture

    check_place(out)
    settings = BaseSettings(name=base, config=base_config, attention=attention, precision=precision)
    sheet = draw_grid(
        prompts,
        adapters=[path_and_weight(text) for text in adapter],
        base=settings,
        grid=_weights(grid),
        negative_prompt=negative,
        seed=seed,
        steps=steps,
        guidance=guidance,
        width=width,
        height=height,
    )
    save_picture(sheet, out)
    print(f"wrote {out} ({sheet.width} x {sheet.height})")


def bake(base: str, adapters: tuple[str, ...], /, *, out: Path, strict_base: bool = False) -> None:
    """Write a base with adapters fused into its weights: a model folder, or a single file of a single file.

    Parameters
    ----------
    base:
        A model's folder, a .safetensors file, pocket, or a hub name that is in the cache.
    adapters:
        Folders or files, each with its weight if it is not 1: runs/ink/adapter=0.8, or by component or block:
        'runs/cat/adapter={"unet": {"down": 0.2, "up": 0.9}}'.
    out:
        The new folder or file.
    strict_base:
        Refuse adapters of another fine-tune of this base.
    """
    from mmpeft.baking import bake as run

    print(run(base, [path_and_blocks(text) for text in adapters], out, strict_base=strict_base).text())


def convert(
    adapter: Path,
    out: Path,
    /,
    *,
    format: Literal["kohya", "diffusers", "peft"] = "kohya",  # noqa: A002 - the flag's name
    base: str | None = None,
    rank: int | None = None,
    error: float | None = None,
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
) -> None:
    """Write an adapter the way another tool reads it, with the same effect.

    Parameters
    ----------
    adapter:
        A folder or a .safetensors file of kohya, LyCORIS, diffusers or PEFT.
    out:
        A .safetensors file; for PEFT, and if wished for diffusers, a folder.
    format:
        kohya (A1111, ComfyUI), diffusers or peft.
    base:
        The model's folder, or pocket; needed where names or the method need it.
    rank:
        Make layers that are no LoRA into LoRA, of at most this rank.
    error:
        Make them LoRA, of the smallest rank that loses at most this share of each layer's change.
    dtype:
        What the numbers are written in; as they are when left out.
    """  # noqa: D405, D411 - a parameter called error is no section
    from mmpeft.exporting import write

    print(write(adapter, out, format, base=base, rank=rank, error=error, dtype=dtype).text())


def inspect(
    path: Path,
    /,
    *,
    base: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Say what is in an adapter: format, method, ranks, alphas, norms, base, metadata, health.

    Parameters
    ----------
    path:
        A folder or a .safetensors file of kohya, LyCORIS, diffusers or PEFT.
    base:
        The model's folder, or pocket: for the norms of methods that depend on its weights.
    as_json:
        Print JSON instead of a table.
    """
    from mmpeft.inspection import inspect as look

    report = look(path, base)
    print(json.dumps(report.as_dict(), indent=2) if as_json else report.text())


def doctor() -> None:
    """Say what works on this machine, and how to get the rest."""
    from mmpeft.doctor import examine

    print(examine().text())


def plugins_command(kind: str | None = None, /) -> None:
    """List methods, backbones, objectives, datasets and strategies.

    Parameters
    ----------
    kind:
        method, backbone, objective, dataset or strategy; all of them when left out.
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


def _weights(text: str) -> list[float]:
    try:
        return [float(weight) for weight in text.split(",") if weight.strip()]
    except ValueError:
        raise ConfigError(f"--grid {text}: must be numbers with commas between, such as 0,0.5,1") from None


def path_and_weight(text: str) -> tuple[Path, float]:
    """Read path=weight, or a path alone, which counts fully.

    Raises:
        ConfigError: the weight is no number.
    """
    path, equals, weight = text.rpartition("=")
    if not equals:
        return Path(text), 1.0
    try:
        return (Path(text), 1.0) if Path(text).exists() else (Path(path), float(weight))
    except ValueError:
        raise ConfigError(f"{text}: the weight after = must be a number; got {weight!r}") from None


def path_and_blocks(text: str) -> tuple[Path, float | dict[str, Any]]:
    """Read path=weight, a path alone, or path={"unet": {"down": 0.2}, ...} with factors by component or block.

    Raises:
        ConfigError: the weight is neither.
    """
    path, brace, rest = text.partition("={")
    if not brace or Path(text).exists():
        return path_and_weight(text)
    try:
        blocks: dict[str, Any] = json.loads("{" + rest)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{text}: the weights after = are no JSON: {error}") from None
    return Path(path), blocks
