"""Find and read a Stable Diffusion base: the embedded one, a folder, a single file or a hub name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmpeft.backbones.pocket import pocket_folder
from mmpeft.errors import BaseError
from mmpeft.plugins import near_miss

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")


# A UNet with more bytes on disk than this is read in half precision when it is computed in that anyway.
_LARGE_UNET_BYTES = 500_000_000


def load_pipeline(name: str, config: Path | None = None, half: torch.dtype | None = None) -> Any:
    """Load a stock StableDiffusionPipeline, in evaluation mode and without a progress bar.

    Args:
        name: "pocket", a diffusers folder, a .safetensors file with the original names, or a hub name.
        config: for a file, a diffusers folder whose configuration and tokenizer are taken; without it they are
            looked up on the hub.
        half: what a large UNet and its text encoder are read in, which never holds them in float32; everything else is
            float32.

    Raises:
        BaseError: it cannot be found, reached or read, or is no Stable Diffusion 1.x or 2.x.
    """
    path = pocket_folder() if name == "pocket" else Path(name).expanduser()
    if path.suffix in _PICKLES:
        raise BaseError(
            f"{path.name} is a pickle file, which can run code when it is opened; convert it to .safetensors"
        )
    if path.suffix == ".safetensors":
        pipeline = _from_single_file(path, config)
    elif path.is_dir():
        pipeline = _from_folder(path, half if _unet_bytes(path) > _LARGE_UNET_BYTES else None)
    elif _looks_like_path(name):
        raise BaseError(f"there is no base {name}{_sibling(path)}")
    else:
        pipeline = _from_hub(name, half)
    _check_parts(pipeline, name)
    pipeline.set_progress_bar_config(disable=True)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        if half is None or model.dtype != half:
            model.float()
        model.eval()
    return pipeline


def plain_title(name: str) -> str:
    """Name a base for an adapter's card: a hub name as it is, of a folder or file only the last part."""
    path = Path(name).expanduser()
    if path.suffix == ".safetensors":
        return path.stem
    return path.resolve().name if path.is_dir() or _looks_like_path(name) else name


def _from_folder(folder: Path, half: torch.dtype | None) -> Any:
    index = folder / "model_index.json"
    if not index.is_file():
        hint = "; it is one component: give the folder above it" if (folder / "config.json").is_file() else ""
        raise BaseError(f"{folder} is no diffusers folder: it has no model_index.json{hint}")
    _check_class(json.loads(index.read_text(encoding="utf-8")), folder.name)
    return _from_pretrained(str(folder), f"{folder} cannot be read", half, local_files_only=True)


def _from_hub(name: str, half: torch.dtype | None) -> Any:
    advice = "give a folder or a file on this machine, or pocket, the base that needs no download"
    hint = near_miss(name, ["pocket", *_names_in(Path())]) if "/" not in name else _sibling(Path(name))
    hint = hint if "did you mean" in hint else ""
    failure = (
        f"there is no folder {name} here{hint}, and no base of this name could be had from the hub; check the name "
        f"and the connection (HF_HUB_OFFLINE must not be set for a first download), or {advice}"
    )
    return _from_pretrained(name, failure, half, local_files_only=False)


def _from_pretrained(name: str, failure: str, half: torch.dtype | None, *, local_files_only: bool) -> Any:
    try:
        with quietly():
            from diffusers import StableDiffusionPipeline

            if not local_files_only:
                _check_class(StableDiffusionPipeline.load_config(name), name)
            return StableDiffusionPipeline.from_pretrained(
                name,
                torch_dtype={"unet": half, "text_encoder": half, "default": torch.float32} if half else None,
                # a mapped file's pages stay beside the copies that other memory layouts make of them
                disable_mmap=half is not None,
                use_safetensors=True,
                local_files_only=local_files_only,
                safety_checker=None,
                feature_extractor=None,
                image_encoder=None,
                requires_safety_checker=False,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseError(f"{failure} ({_first_line(error)})") from error


def _from_single_file(path: Path, config: Path | None) -> Any:
    if not path.is_file():
        raise BaseError(f"there is no base {path}{_sibling(path)}")
    if config is not None and not (config / "model_index.json").is_file():
        raise BaseError(
            f"base.config: {config} is no diffusers folder: it has no model_index.json; weights are not needed there"
        )
    if config is not None:
        _check_class(json.loads((config / "model_index.json").read_text(encoding="utf-8")), config.name)
    try:
        with quietly():
            from diffusers import StableDiffusionPipeline

            return StableDiffusionPipeline.from_single_file(
                str(path),
                config=str(config) if config else None,
                local_files_only=config is not None,
                safety_checker=None,
                feature_extractor=None,
                image_encoder=None,
                requires_safety_checker=False,
            )
    except Exception as error:  # diffusers raises all sorts here, down to AttributeError and SafetensorError
        advice = (
            "its shapes or names do not fit that configuration"
            if config
            else "its configuration may be missing: give base.config, a diffusers folder of the same architecture"
        )
        raise BaseError(
            f"{path.name} cannot be read as Stable Diffusion ({_first_line(error)}); {advice}"
        ) from error


def _check_class(index: dict[str, Any], name: str) -> None:
    kind = str(index.get("_class_name"))
    if "text_encoder_2" in index or "unet" not in index or "vae" not in index:
        raise BaseError(
            f"{name} is a {kind}; this backbone takes Stable Diffusion 1.x and 2.x (StableDiffusionPipeline)"
        )


def _check_parts(pipeline: Any, name: str) -> None:
    latent = pipeline.vae.config.latent_channels
    if pipeline.unet.config.in_channels != latent:
        raise BaseError(
            f"{name} takes {pipeline.unet.config.in_channels} input channels where its VAE gives {latent}: it is an "
            f"inpainting, depth or editing model; choose a text-to-image base"
        )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _sibling(path: Path) -> str:
    names = _names_in(path.parent)
    return near_miss(path.name, names) if "did you mean" in near_miss(path.name, names) else ""


def _unet_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "unet").glob("*.safetensors"))


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


@contextmanager
def quietly() -> Iterator[None]:
    """Keep loading bars and notes about optional packages off the terminal, and put the libraries' logging back."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # What the libraries deprecate in each other is nothing that a user could change.
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
