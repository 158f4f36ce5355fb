"""One switch for memory-efficient attention on classic UNets, VAEs and transformers' text encoders.

What a library says it has switched is not what runs: `set_attention_backend` on a classic UNet changes nothing, in
silence. So the switch sets attention processors, and `active_attention` reads them back from the modules.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmpeft.errors import ConfigError, MissingDependency

AttentionChoice = Literal["auto", "sdpa", "xformers", "flash", "sliced", "eager"]

# Processor class -> what it is; a plain transformers text encoder says it in its configuration.
_KINDS = {
    "AttnProcessor2_0": "sdpa",
    "XFormersAttnProcessor": "xformers",
    "FlashProcessor": "flash",
    "SlicedProcessor": "sliced",
    "AttnProcessor": "eager",
}


class FlashProcessor:
    """Attend with scaled dot-product attention's flash kernel and no other.

    Dao 2023, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv:2307.08691.
    """

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.processor = AttnProcessor2_0()

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Run one attention module; diffusers' processor contract."""
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            result: Tensor = self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return result


class SlicedProcessor:
    """Attend to some heads at a time: the score matrix needs memory for those only, and time is lost.

    Args:
        slice_size: (sample, head) pairs at a time.
    """

    def __init__(self, slice_size: int) -> None:
        from diffusers.models.attention_processor import SlicedAttnProcessor

        self.processor = SlicedAttnProcessor(slice_size)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Run one attention module; diffusers' processor contract, with the `temb` that its own sliced one lacks."""
        result: Tensor = self.processor(attn, hidden_states, encoder_hidden_states, attention_mask)
        return result


def set_attention(
    components: Mapping[str, nn.Module],
    choice: AttentionChoice,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Switch the attention of models and say what is active now.

    A text encoder has few tokens and no memory to save: it takes sdpa for every choice but eager.

    Args:
        components: models by component name; one without attention is left alone.
        choice: auto is sdpa; sliced halves the heads; flash is sdpa's flash kernel alone.
        device: where the models run.
        dtype: what they compute in.

    Returns:
        One line read back from the modules, such as "flash (unet, vae), sdpa (text_encoder)".

    Raises:
        ConfigError: the choice cannot run here, or has not become active; the sentence says what can.
        MissingDependency: xformers is not installed.
    """
    wanted = "sdpa" if choice == "auto" else choice
    _check_available(wanted, device, dtype)
    for model in components.values():
        if _has_processors(model):
            _set_processors(model, wanted)
        elif hasattr(model, "set_attn_implementation"):
            cast(Any, model).set_attn_implementation("eager" if wanted == "eager" else "sdpa")
    active = {name: active_attention(model) for name, model in components.items()}
    for name, kind in active.items():
        text_encoder = not _has_processors(components[name])
        expected = (
            {wanted, "none"} if not text_encoder else {"eager" if wanted == "eager" else "sdpa", "none"}
        )
        if kind not in expected:
            raise ConfigError(
                f"base.attention: {wanted} was asked for, but {name} runs {kind}; choose another attention"
            )
    kinds = [kind for kind in dict.fromkeys(active.values()) if kind != "none"]
    return ", ".join(f"{kind} ({', '.join(n for n, k in active.items() if k == kind)})" for kind in kinds)


def active_attention(model: nn.Module) -> str:
    """Say which attention a model really runs, read from its modules.

    Returns:
        sdpa, xformers, flash, sliced or eager; none without attention; several joined by "+"; a class name for
        a processor that this switch does not know.
    """
    if hasattr(model, "attn_processors"):
        names = sorted({type(processor).__name__ for processor in cast(Any, model).attn_processors.values()})
        return "+".join(_KINDS.get(name, name) for name in names) or "none"
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return str(implementation or "none")


def measure_attention(
    components: Mapping[str, nn.Module],
    step: Callable[[], object],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    repeats: int = 3,
) -> tuple[AttentionChoice, dict[AttentionChoice, float]]:
    """Time each attention that runs here and leave the fastest switched on.

    Small models train faster with eager attention than with sdpa, whose backward pass costs more than it saves
    at short sequences; only a measurement knows.

    Args:
        step: one forward and backward pass through the models.
        repeats: timed steps of each candidate, after one that is not timed; the fastest counts.

    Returns:
        The choice that is active now, and seconds per step of every candidate.
    """
    seconds: dict[AttentionChoice, float] = {}
    candidates: tuple[AttentionChoice, ...] = ("sdpa", "flash", "eager", "xformers")
    for choice in candidates:
        try:
            set_attention(components, choice, device=device, dtype=dtype)
        except (ConfigError, MissingDependency):
            continue
        step()
        seconds[choice] = min(_seconds(step, device) for _ in range(repeats))
    best = min(seconds, key=seconds.__getitem__)
    set_attention(components, best, device=device, dtype=dtype)
    return best, seconds


def _check_available(choice: str, device: torch.device, dtype: torch.dtype) -> None:
    if choice == "xformers":
        if device.type != "cuda":
            raise ConfigError(
                f"base.attention: xformers runs on CUDA only and this model is on {device.type}; "
                f"use sdpa (the default), flash, sliced or eager"
            )
        if importlib.util.find_spec("xformers") is None:
            raise MissingDependency("xformers", "base.attention xformers", "pip install 'mmpeft[xformers]'")
    if choice == "flash":
        try:
            probe = torch.zeros(1, 1, 8, 8, device=device, dtype=dtype, requires_grad=True)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                nn.functional.scaled_dot_product_attention(probe, probe, probe).sum().backward()
        except RuntimeError as error:
            raise ConfigError(
                f"base.attention: flash cannot run in {str(dtype).removeprefix('torch.')} on {device.type} here "
                f"({str(error).splitlines()[0]}); use sdpa (the default), or base.precision bf16 or fp16 on CUDA"
            ) from error


def _has_processors(model: nn.Module) -> bool:
    return hasattr(model, "set_attn_processor")


def _set_processors(model: Any, choice: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if choice == "xformers":
        model.enable_xformers_memory_efficient_attention()
        return
    makers: dict[str, Callable[[int], object]] = {
        "sdpa": lambda heads: AttnProcessor2_0(),
        "flash": lambda heads: FlashProcessor(),
        "sliced": lambda heads: SlicedProcessor(max(heads // 2, 1)),
        "eager": lambda heads: AttnProcessor(),
    }
    processors = {
        name: makers[choice](model.get_submodule(name.removesuffix(".processor")).heads)
        for name in model.attn_processors
    }
    model.set_attn_processor(processors)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
