"""The recipe: one definition gives the TOML file, the command-line flags, their help and the validation.

A recipe is frozen; what a run learns about itself lives elsewhere. Sections that belong to a plugin (`data`,
`method`, `objective`) are validated with the settings class of the plugin that their `name` says, so a setting is
written once, beside the code that uses it.
"""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)

from mmpeft import plugins
from mmpeft.errors import ConfigError

S = TypeVar("S", bound=BaseModel)

# Recipe section -> (plugin kind, the plugin that an empty section means).
PLUGIN_SECTIONS = {
    "data": ("dataset", "image_folder"),
    "method": ("method", "lora"),
    "objective": ("objective", "denoise"),
}


class Settings(BaseModel):
    """A frozen group of settings; unknown keys are errors; a field's docstring is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class PluginSettings(Settings):
    """Settings of a plugin section; `name` says which plugin."""

    name: str


class BaseSettings(Settings):
    """The frozen model that is adapted."""

    name: str = "pocket"
    """pocket, a folder, a .safetensors file, or a hub name"""
    backbone: str = "stable_diffusion"
    """family of models that it belongs to"""
    config: Path | None = None
    """folder with the model's configuration, for a single-file base without a hub"""
    attention: Literal["auto", "sdpa", "xformers", "flash", "sliced", "eager"] = "auto"
    """memory-efficient attention; auto takes the best that works here and says which"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """what the frozen model computes in; the adapter itself is always float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    channels_last: bool = True
    """keep convolution weights and images channels-last"""
    compile: bool = False
    """torch.compile the denoiser; pays after some thousand steps on a CPU"""
    clip_skip: int = Field(default=0, ge=0)
    """text encoder layers to leave off at the end; 0 uses all"""


class ComponentSettings(Settings):
    """How one component of the base is adapted."""

    train: bool = True
    """whether this component learns"""
    targets: tuple[str, ...] | None = None
    """its own target groups or patterns; none takes method.targets"""
    learning_rate: float | None = Field(None, gt=0)
    """its own peak learning rate; none takes train.learning_rate"""
    stop_after: float = Field(1.0, gt=0, le=1)
    """share of the steps after which it stops learning"""


class TrainSettings(Settings):
    """The loop."""

    steps: int = Field(1000, ge=1)
    """optimiser steps"""
    batch_size: int = Field(4, ge=1)
    """samples that one process takes through the model at once"""
    accumulate: int = Field(1, ge=1)
    """micro-batches that one optimiser step adds up"""
    learning_rate: float = Field(1e-4, gt=0)
    """peak learning rate (Prodigy: 1)"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning-rate schedule after the warm-up; linear and cosine end at 0 with the last step"""
    warmup_steps: int = Field(0, ge=0)
    """steps over which the learning rate rises from 0"""
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "adafactor"] = "adamw"
    """adamw8bit needs bitsandbytes, prodigy needs prodigyopt"""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay rates"""
    weight_decay: float = Field(1e-3, ge=0)
    """decoupled weight decay"""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """clip the gradient of a whole step to this norm; none does not clip"""
    ema: float | None = Field(None, gt=0, lt=1)
    """decay of the exponential moving average that is saved instead of the last step; none saves the last step"""
    processes: int = Field(1, ge=1)
    """processes on this machine"""
    checkpoint_every: int = Field(250, ge=1)
    """steps between checkpoints"""
    keep_checkpoints: int = Field(2, ge=1)
    """newest checkpoints that are kept"""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """where the curves go besides the run's own files"""

    @property
    def step_size(self) -> int:
        """Samples of a full optimiser step, over accumulation and processes."""
        return self.batch_size * self.accumulate * self.processes


class ValidationSettings(Settings):
    """The loss on held-out samples, at fixed timesteps and noise."""

    images: Path | None = None
    """folder of held-out images with captions; none does not validate"""
    every: int = Field(100, ge=1)
    """steps between two looks"""


class PreviewPrompt(Settings):
    """One preview picture."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    width: int | None = None
    height: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"prompt": data} if isinstance(data, str) else data


class PreviewSettings(Settings):
    """Pictures drawn while training."""

    every: int | None = Field(None, ge=1)
    """steps between previews (step 0 and the last are always drawn when prompts are given); none draws only those"""
    prompts: tuple[PreviewPrompt, ...] = ()
    steps: int = Field(20, ge=1)
    guidance: float = 4.0


class Recipe(Settings):
    """Everything that a training run is told."""

    out: Path
    """folder of the run"""
    seed: int = 0
    """every random draw derives from it"""
    init_from: Path | None = None
    """start from this adapter instead of from nothing"""
    cache: Path | None = None
    """folder for latents and text embeddings, which several runs may share; none keeps them in the run's folder"""
    base: BaseSettings = BaseSettings()
    data: SerializeAsAny[PluginSettings]
    method: SerializeAsAny[PluginSettings]
    objective: SerializeAsAny[PluginSettings]
    components: dict[str, ComponentSettings] = {}
    """per component (unet, text_encoder, ...); without any, the backbone's denoiser or language model learns"""
    train: TrainSettings = TrainSettings()
    validation: ValidationSettings = ValidationSettings()
    preview: PreviewSettings = PreviewSettings()

    @model_validator(mode="before")
    @classmethod
    def _choose_plugins(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        chosen = dict(data)
        for section, (kind, default) in PLUGIN_SECTIONS.items():
            given = chosen.get(section) or {}
            if isinstance(given, Mapping):
                settings_type = plugins.get(kind, given.get("name", default)).settings_type
                chosen[section] = _validate(settings_type, {"name": default, **given}, section)
        if isinstance(chosen.get("base"), str):
            chosen["base"] = {"name": chosen["base"]}
        return chosen

    @classmethod
    def build(cls, *layers: Mapping[str, Any]) -> Self:
        """Validate settings given in layers, the later ones winning; keys may be dotted or nested.

        Raises:
            ConfigError: an unknown key (a close one is suggested), or a value that is not allowed.
        """
        merged: dict[str, Any] = {}
        for layer in layers:
            merge(merged, nested(layer))
        return _validate(cls, merged, "")

    def dotted(self) -> dict[str, Any]:
        """Flatten to {"train.steps": 1000, ...} with JSON values; to compare two recipes or to print one."""
        return dict(_flat(self.model_dump(mode="json")))

    def public(self, instead: Mapping[str, Any]) -> dict[str, Any]:
        """Give the dotted recipe without what belongs to the user's machine and data: no path, no caption.

        Args:
            instead: setting -> what stands for it, a digest or a plain name.
        """
        private = {key for key, value in _flat(self.model_dump()) if isinstance(value, Path)} | {
            "data.caption"
        }
        return {key: value for key, value in self.dotted().items() if key not in private} | dict(instead)


def flags_type(chosen: Mapping[str, str]) -> type[Settings]:
    """Derive the type behind the command line's flags: a recipe in which every setting may be left out.

    Args:
        chosen: recipe section -> plugin name; sections that are not named take their default plugin.
    """
    fields: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if name in PLUGIN_SECTIONS:
            kind, default = PLUGIN_SECTIONS[name]
            settings_type = plugins.get(kind, chosen.get(name, default)).settings_type
            fields[name] = (settings_type, Field(settings_type(), description=f"see mmpeft plugins {kind}"))
        elif name != "out":
            fields[name] = (field.annotation, field)
    return create_model("Flags", __base__=Settings, **fields)


def error_sentence(settings_type: type[BaseModel], error: ValidationError) -> str:
    """Word a validation error in one sentence: the setting, what is wrong, what was given."""
    return "; ".join(_sentence(settings_type, entry, "") for entry in error.errors())


def read_toml(path: Path) -> dict[str, Any]:
    """Read a recipe file as nested settings.

    Raises:
        ConfigError: the file is missing or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn {"train.steps": 5} into {"train": {"steps": 5}}; nested mappings pass; `base = "x"` means its name."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "base" and isinstance(value, str | Path):
            value = {"name": str(value)}
        *parents, leaf = key.split(".")
        place: dict[str, Any] = {leaf: nested(value) if isinstance(value, Mapping) else value}
        for parent in reversed(parents):
            place = {parent: place}
        merge(result, place)
    return result


def merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Lay nested settings over others in place; a section of another plugin replaces the one below."""
    for key, value in layer.items():
        below = into.get(key)
        if isinstance(value, Mapping) and isinstance(below, dict):
            renamed = key in PLUGIN_SECTIONS and value.get("name", below.get("name")) != below.get("name")
            if renamed:
                into[key] = dict(value)
            else:
                merge(below, value)
        else:
            into[key] = nested(value) if isinstance(value, Mapping) else value


def _validate(settings_type: type[S], data: Mapping[str, Any], section: str) -> S:
    try:
        return settings_type.model_validate(data)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(settings_type, e, section) for e in error.errors())) from error


def _sentence(settings_type: type[BaseModel], error: Any, section: str) -> str:
    where = ".".join(str(part) for part in ((section,) if section else ()) + error["loc"])
    if error["type"] == "extra_forbidden":
        owner: Any = settings_type
        for part in error["loc"][:-1]:
            field = getattr(owner, "model_fields", {}).get(part)
            owner = field.annotation if field else None
        known = list(getattr(owner, "model_fields", {}))
        return f"{where}: there is no such setting{plugins.near_miss(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return f"{where}: must be given"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}; got {error['input']!r}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
