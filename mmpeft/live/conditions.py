"""Adapter weights that vary: what a mix's schedules, masks and samples mean at one layer in one forward pass.

A forward pre-hook on the denoiser learns the timestep, the batch and the size of the latents. From these come the
factors that a branch multiplies its adapters with. They are made by tensor operations, so that a compiled denoiser
does not care which timestep it is, which points a schedule has, or what a mask shows.

Masks. Convolutions and layers whose tokens are places get the mask in their own resolution. Cross-attention's `to_k`
and `to_v`, and joint attention's `add_?_proj`, see text: their adapters cannot speak for one place alone, so the
attention runs once without the masked adapters and once more for each group of adapters with equal masks, and the
outputs are blended: out = without + sum of mask * (with - without). Everything that sees neither (time embedding,
pooled text, text streams, text encoders) takes the mask's mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmpeft.batch_layout import BatchLayout, check_samples, factors_of_rows, needs_layout
from mmpeft.errors import BankError
from mmpeft.live.places import Places
from mmpeft.mix import Mix, Schedule, Weight, interpolate

DENOISERS = ("unet", "transformer")

# diffusers' denoisers whose timestep is a share and no step: of noise, or of the image.
_SHARES_OF_NOISE = ("Flux", "Chroma", "AuraFlow", "QwenImage", "LongCatImage", "OvisImage", "BriaFibo2")
_SHARES_OF_IMAGE = ("Lumina2", "ZImage")

_TEXT_ATTENTION = ("attn2.to_k", "attn2.to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_TEXT_STREAM = ("_context", "context_embed", "to_add_out", "caption_projection", "text_embed", "encoder_hid")

# Schedules are filled up to a multiple of so many points: other points are then no other shape to a compiled model.
_POINTS = 8


class Conditions:
    """The varying part of a bank's mix.

    Args:
        modules: the bank's modules by component; "unet" and "transformer" are denoisers.
        timesteps: how many the noise schedule has; the last is pure noise.
    """

    varies: bool
    """whether any weight of the mix varies"""

    def __init__(self, modules: Mapping[str, nn.Module], *, timesteps: int = 1000) -> None:
        self._denoisers = tuple(component for component in modules if component in DENOISERS)
        self._handles: list[RemovableHandle] = []
        self._layout: BatchLayout | None = None
        self._region: int | None = None
        self.set_mix(Mix())
        for component in self._denoisers:
            self._watch(modules[component], timesteps)

    def set_mix(self, mix: Mix) -> None:
        """Take over what varies in a mix.

        Raises:
            BankError: the weights per sample are not as many as the declared layout has prompts.
        """
        varying = {name: weight for name, weight in mix.weights.items() if weight.varies}
        # a last column of ones is for the adapters that do not vary
        weights = (*varying.values(), Weight())
        check_samples(weights, self._layout)
        masks = tuple(dict.fromkeys(weight.mask for weight in weights if weight.mask is not None))
        self._weights = weights
        self._columns = {name: column for column, name in enumerate(varying)}
        self._masks = {name: masks.index(w.mask) for name, w in varying.items() if w.mask is not None}
        self._places = Places(masks)
        self._means = torch.tensor([1.0 if w.mask is None else float(w.mask.area.mean()) for w in weights])
        self._times, self._values = _points([w.schedule or Schedule(((0.0, 1.0),)) for w in weights])
        self._needs_layout = needs_layout(weights)
        self._lay_out(self._layout)
        # regions that an attention's layers asked for; what a pass that failed left is not the next one's
        self._asked: frozenset[int] = frozenset()
        self._now: Tensor | None = None
        self._now_mean: Tensor | None = None
        self.varies = bool(varying)

    @contextmanager
    def layout(self, layout: BatchLayout) -> Iterator[None]:
        """Declare within a with block how batches are laid out; the layout before it comes back after it.

        Raises:
            BankError: as `set_mix`.
        """
        check_samples(self._weights, layout)
        before = self._layout
        self._lay_out(layout)
        try:
            yield
        finally:
            self._lay_out(before)

    def factors(
        self, names: Sequence[str], layer: str, x: Tensor, kind: Literal["linear", "conv"]
    ) -> Tensor | None:
        """Give what the adapters are multiplied with at a layer now, beside the constant part of their weights.

        Args:
            names: the adapters.
            layer: name on disk with the component.
            x: what will be multiplied, (B, C, h, w) for a convolution, (B, D) or (B, T, D) for a linear layer; only
                its shape, type and device count.

        Returns:
            (B or 1, n, h or 1, w or 1) for a convolution, (B or 1, T or 1, n) or (B or 1, n) for a linear layer, in
            `x`'s type; None where nothing varies.

        Raises:
            BankError: the batch is laid out otherwise than declared or its layout is not known; the layer was called
                outside its denoiser; a mask cannot be laid on the layer's tokens.
        """
        if not self.varies or not any(name in self._columns for name in names):
            return None
        masks = [self._masks.get(name, -1) for name in names]
        if layer.partition(".")[0] not in self._denoisers:
            sees = "nothing"
            rows = self._at_rest(x.device)
        else:
            sees = _sees(layer, x) if max(masks) >= 0 else "nothing"
            rows = self._in_time(layer, mean=sees == "nothing")
        self._check_batch(layer, len(rows), x)
        columns = [rows[:, self._columns.get(name, -1)] for name in names]
        if sees == "text":
            self._asked = self._asked | {mask for mask in masks if mask >= 0}
            columns = [c * float(m in (-1, self._region)) for c, m in zip(columns, masks, strict=True)]
        factor = _shaped(torch.stack(columns, -1).to(x.dtype), x, kind)
        if sees != "places":
            return factor
        if kind == "conv":
            return factor * self._places.over_pixels(masks, x)
        return factor * self._places.over_tokens(masks, x, layer)

    def detach(self) -> None:
        """Take the hooks off the denoiser."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, module: Any, timesteps: int) -> None:
        module = getattr(module, "_orig_mod", module)
        begin = partial(self._begin, _Denoiser.of(module, timesteps))
        self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        for name, part in module.named_modules():
            is_cross = name.endswith("attn2") and isinstance(getattr(part, "to_k", None), nn.Module)
            if is_cross or isinstance(getattr(part, "add_k_proj", None), nn.Module):
                self._handles.append(part.register_forward_hook(self._blend, with_kwargs=True))

    def _lay_out(self, layout: BatchLayout | None) -> None:
        self._layout = layout
        self._rows = factors_of_rows(self._weights, layout)
        self._rest: dict[torch.device, Tensor] = {}

    def _begin(
        self, denoiser: _Denoiser, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Learn what a forward pass of the denoiser is about."""
        if not self.varies:
            return
        given = {**dict(zip(denoiser.parameters, args, strict=False)), **kwargs}
        time = denoiser.time(given)
        device = time.device
        factors = interpolate(time, self._times.to(device), self._values.to(device))
        self._now = factors * self._known_rows().to(device)
        self._now_mean = self._now * self._means.to(device)
        self._asked = frozenset()
        self._places.learn(given, denoiser.patch, self._layout.places if self._layout else None)

    def _known_rows(self) -> Tensor:
        if self._rows is None:
            raise BankError(
                "weights per sample or for the conditional branch need to know which row of a batch is what; declare "
                "it with bank.batch(BatchLayout(prompts=..., per_prompt=..., guidance=...)), or use mmpeft's pipelines"
            )
        return self._rows

    def _in_time(self, layer: str, *, mean: bool) -> Tensor:
        rows = self._now_mean if mean else self._now
        if rows is None:
            raise BankError(
                f"the weights vary, and {layer} was called without its denoiser: what time it is cannot be known"
            )
        return rows

    def _at_rest(self, device: torch.device) -> Tensor:
        """Give the rows for what is no denoiser: schedules at time 0, masks by their mean."""
        if torch.compiler.is_compiling():
            return self._start().to(device)
        if device not in self._rest:
            # tensors made in inference mode could not be used where gradients flow later
            with torch.inference_mode(False), torch.no_grad():
                self._rest[device] = self._start().to(device)
        return self._rest[device]

    def _start(self) -> Tensor:
        return interpolate(torch.zeros(1), self._times, self._values) * self._known_rows() * self._means

    def _check_batch(self, layer: str, rows: int, x: Tensor) -> None:
        if self._needs_layout and self._layout is not None and x.shape[0] != self._layout.rows:
            raise BankError(
                f"{layer} got a batch of {x.shape[0]}, and the layout that was declared has {self._layout.rows} rows: "
                f"{self._layout}"
            )
        if rows not in (1, x.shape[0]):
            raise BankError(
                f"{layer} got a batch of {x.shape[0]}, and the denoiser was given {rows} timesteps"
            )

    def _blend(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any | None:
        """Run an attention once more for each region that its text layers have adapters in, and blend."""
        if not self._asked:
            return None
        outputs = output if isinstance(output, tuple) else (output,)
        blended = list(outputs)
        for region in sorted(self._asked):
            self._region = region
            try:
                within = module.forward(*args, **kwargs)
            finally:
                self._region = None
            within = within if isinstance(within, tuple) else (within,)
            for place, (with_it, without) in enumerate(zip(within, outputs, strict=True)):
                share = self._share(region, without, is_text=place > 0)
                blended[place] = blended[place] + share * (with_it - without)
        self._asked = frozenset()
        return tuple(blended) if isinstance(output, tuple) else blended[0]

    def _share(self, region: int, output: Tensor, *, is_text: bool) -> Tensor:
        """Give a region's mask over an attention's output; joint attention's second output is text."""
        if is_text:
            return self._places.mean([region], output)
        if output.ndim == 4:
            return self._places.over_pixels([region], output)
        return self._places.over_tokens([region], output, "an attention's output")


@dataclass(frozen=True)
class _Denoiser:
    """What is constant about a denoiser's forward."""

    parameters: tuple[str, ...]
    noise: float
    """what it calls the timestep of pure noise"""
    image: float
    """what it calls the timestep of the image"""
    patch: int | None

    @classmethod
    def of(cls, module: Any, timesteps: int) -> _Denoiser:
        parameters = tuple(inspect.signature(type(module).forward).parameters)[1:]
        patch = getattr(getattr(module, "config", None), "patch_size", None)
        name = type(module).__name__
        noise, image = timesteps - 1.0, 0.0
        if name.startswith(_SHARES_OF_NOISE):
            noise = 1.0
        elif name.startswith(_SHARES_OF_IMAGE):
            noise, image = 0.0, 1.0
        return cls(parameters, noise, image, patch if isinstance(patch, int) else None)

    def time(self, given: Mapping[str, Any]) -> Tensor:
        """Read the timestep, a number, (), (1,) or (B,); give (1,) or (B,), float32 from 0, noise, to 1, image."""
        sample = given["sample"] if "sample" in given else given.get("hidden_states")
        device = sample.device if isinstance(sample, Tensor) else None
        timestep = torch.as_tensor(given["timestep"], dtype=torch.float32, device=device)
        if timestep.ndim > 1:
            raise BankError(
                f"weights that vary need one timestep for each sample; got shape {tuple(timestep.shape)}"
            )
        return ((timestep.reshape(-1) - self.noise) / (self.image - self.noise)).clamp(0, 1)


def _sees(layer: str, x: Tensor) -> Literal["text", "places", "nothing"]:
    if layer.removesuffix(".bias").endswith(_TEXT_ATTENTION):
        return "text"
    return "nothing" if x.ndim == 2 or any(part in layer for part in _TEXT_STREAM) else "places"


def _shaped(factor: Tensor, x: Tensor, kind: str) -> Tensor:
    """Bring factors (B or 1, n) into a form that multiplies `x`."""
    between = [1] * (x.ndim - 2)
    rows, count = factor.shape
    return factor.reshape(rows, count, *between) if kind == "conv" else factor.reshape(rows, *between, count)


def _points(schedules: Sequence[Schedule]) -> tuple[Tensor, Tensor]:
    """Give the schedules' times and factors, each (n, points)."""
    points = [list(schedule.points) for schedule in schedules]
    length = -(-max(map(len, points)) // _POINTS) * _POINTS
    times, factors = torch.tensor([p + p[-1:] * (length - len(p)) for p in points]).unbind(-1)
    return times.contiguous(), factors.contiguous()
