"""Drawing pictures with a base and adapters from disk, alone or over a grid of adapter weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmpeft import plugins
from mmpeft.bank import attach
from mmpeft.config import BaseSettings
from mmpeft.errors import AdapterError, ConfigError
from mmpeft.picture_grid import picture_grid

# What a run calls the folders of its adapters; the run's own name says more.
_FOLDERS_OF_A_RUN = ("adapter", "best")


def draw(
    prompts: Sequence[str],
    *,
    adapters: Sequence[tuple[str | Path, float]] = (),
    base: str | BaseSettings = "pocket",
    negative_prompt: str = "",
    seed: int = 0,
    steps: int = 20,
    guidance: float = 4.0,
    width: int | None = None,
    height: int | None = None,
) -> list[Image.Image]:
    """Draw one picture for each prompt with adapters mixed at the weights that are given.

    Args:
        prompts: at least one.
        adapters: (folder or file, adapter weight) of each; weight 0 is the base alone.
        base: pocket, a folder, a .safetensors file, a hub name, or settings with precision and attention.
        negative_prompt: what none of the pictures should show.
        seed: of the first picture; the n-th prompt after it takes seed + n.
        steps: denoising steps.
        guidance: classifier-free guidance; 1 is without.
        width: of every picture, pixels; none takes the base's own.
        height: as `width`.

    Raises:
        ConfigError: there is no prompt, or a size that the base cannot draw.
        BaseError: the base cannot be opened.
        AdapterError: an adapter is missing, broken, or fits another base.
    """
    studio = _Studio(prompts, adapters, base, negative_prompt, seed, steps, guidance, width, height)
    return studio.pictures([weight for _, weight in adapters])


def draw_grid(
    prompts: Sequence[str],
    *,
    adapters: Sequence[tuple[str | Path, float]] = (),
    grid: Sequence[float] = (),
    base: str | BaseSettings = "pocket",
    negative_prompt: str = "",
    seed: int = 0,
    steps: int = 20,
    guidance: float = 4.0,
    width: int | None = None,
    height: int | None = None,
) -> Image.Image:
    """Draw pictures on one labelled sheet; a picture differs from its neighbours by what the labels say alone.

    With `grid` and one adapter: a row for each prompt, a column for each weight. With `grid` and two adapters: one
    prompt, a row for each weight of the first adapter and a column for each of the second. Without `grid`: a row for
    each prompt; a single picture comes bare, at its own size.

    Args:
        grid: adapter weights; they take the place of those in `adapters`.

    The other arguments are those of `draw`.

    Raises:
        ConfigError: also a grid without an adapter, with more than two, or with two and several prompts.
        BaseError, AdapterError: as `draw`.
    """
    if grid:
        _check_grid(prompts, adapters)
    studio = _Studio(prompts, adapters, base, negative_prompt, seed, steps, guidance, width, height)
    if not grid:
        pictures = studio.pictures([weight for _, weight in adapters])
        return (
            pictures[0] if len(pictures) == 1 else picture_grid([[p] for p in pictures], row_labels=prompts)
        )
    if len(adapters) == 1:
        columns = [studio.pictures([weight]) for weight in grid]
        rows = [list(row) for row in zip(*columns, strict=True)]
        return picture_grid(rows, row_labels=prompts, column_labels=_labels(studio.names[0], grid))
    rows = [[studio.pictures([first, second])[0] for second in grid] for first in grid]
    first_name, second_name = studio.names
    return picture_grid(rows, row_labels=_labels(first_name, grid), column_labels=_labels(second_name, grid))


class _Studio:
    """An open base with its adapters loaded, and what stays the same from picture to picture."""

    def __init__(
        self,
        prompts: Sequence[str],
        adapters: Sequence[tuple[str | Path, float]],
        base: str | BaseSettings,
        negative_prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        width: int | None,
        height: int | None,
    ) -> None:
        if not prompts:
            raise ConfigError("there is no prompt to draw; give at least one")
        if steps < 1:
            raise ConfigError(f"steps: must be at least 1; got {steps}")
        paths = [Path(path) for path, _ in adapters]
        for path in paths:
            # Before the base is opened, which may take minutes.
            if not path.exists():
                raise AdapterError(f"there is no adapter at {path}; give a folder or a .safetensors file")
        self.names = _names(paths)
        self._prompts = list(prompts)
        self._negative_prompts = [negative_prompt] * len(prompts)
        self._seeds = [seed + number for number in range(len(prompts))]
        self._steps, self._guidance, self._width, self._height = steps, guidance, width, height
        settings = base if isinstance(base, BaseSettings) else BaseSettings(name=base)
        self._backbone = plugins.get("backbone", settings.backbone).open(settings)
        self._bank = attach(self._backbone.pipeline())
        for path, name in zip(paths, self.names, strict=True):
            self._bank.load(path, name)

    def pictures(self, weights: Sequence[float]) -> list[Image.Image]:
        """Draw every prompt with the adapters at these weights."""
        self._bank.mix(dict(zip(self.names, weights, strict=True)))
        pictures: list[Image.Image] = self._backbone.generate(
            self._prompts,
            negative_prompts=self._negative_prompts,
            seeds=self._seeds,
            steps=self._steps,
            guidance=self._guidance,
            width=self._width,
            height=self._height,
        )
        return pictures


def _check_grid(prompts: Sequence[str], adapters: Sequence[tuple[str | Path, float]]) -> None:
    if not adapters:
        raise ConfigError("a grid of weights needs an adapter; add --adapter FOLDER")
    if len(adapters) > 2:
        raise ConfigError(f"a grid of weights has room for two adapters; got {len(adapters)}")
    if len(adapters) == 2 and len(prompts) > 1:
        raise ConfigError(
            f"a grid over two adapters draws one prompt; got {len(prompts)}: draw them one after another"
        )


def _names(paths: Sequence[Path]) -> list[str]:
    names: list[str] = []
    for path in paths:
        absolute = path.absolute()
        folder = absolute if absolute.is_dir() else absolute.parent
        of_a_run = folder.name in _FOLDERS_OF_A_RUN and (
            absolute.is_dir() or (folder / "adapter.json").exists()
        )
        name = folder.parent.name if of_a_run else absolute.stem if absolute.is_file() else absolute.name
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def _labels(name: str, weights: Sequence[float]) -> list[str]:
    return [f"{name} {weight:g}" for weight in weights]
