"""LoRA: a low-rank change beside each frozen weight.

W' = W + (alpha / rank) B A. Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
With rsLoRA the factor is alpha / sqrt(rank), which keeps the step size at high ranks. Kalajdzievski 2023, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732. Attached through PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from mmpeft.delta import Delta, LowRank
from mmpeft.errors import MethodError
from mmpeft.injection import is_adaptable, matches
from mmpeft.layer_adapter import LayerAdapter
from mmpeft.methods.base import Method, MethodSettings

# PEFT keeps the parameters of several adapters apart by name.
ADAPTER_NAME = "default"


class LoraSettings(MethodSettings):
    """Low-rank adaptation of linear and convolution layers."""

    name: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1)
    """inner dimension of the change"""
    alpha: float | None = Field(None, gt=0)
    """strength: the change is multiplied by alpha/rank; none takes the layer's rank, a factor of 1"""
    rslora: bool = False
    """multiply by alpha/sqrt(rank) instead"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """share of the layer's inputs that the change does not see while training"""
    rank_pattern: dict[str, int] = Field({})
    """rank of the layers that a pattern names, the first match counting"""
    alpha_pattern: dict[str, float] = Field({})
    """alpha of the layers that a pattern names, the first match counting"""

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _rejoin(cls, patterns: Any) -> Any:
        # A recipe's dotted keys arrive split into nested tables, the dots of layer names alike.
        return dict(_joined(patterns)) if isinstance(patterns, Mapping) else patterns

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _positive(cls, patterns: dict[str, float]) -> dict[str, float]:
        for pattern, value in patterns.items():
            if value <= 0:
                raise ValueError(f"{pattern!r} must be above 0, got {value}")
        return patterns


@dataclass(frozen=True, eq=False)
class LoraLayer(LayerAdapter):
    """The two factors of one layer, in the shapes and the dtype in which they lie on disk.

    Args:
        lora_A: (rank, in); of a convolution (rank, in, kh, kw).
        lora_B: (out, rank); of a convolution (out, rank, 1, 1).
        alpha: as it was saved.
        rslora: whether the scale is alpha/sqrt(rank) instead of alpha/rank.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    rslora: bool = False
    method: ClassVar[str] = "lora"

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape: (out, in) or (out, in, kh, kw)."""
        return self.lora_B.shape[0], *self.lora_A.shape[1:]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """lora_A and lora_B."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give scale * B A, low-rank; the base's weight is not needed."""
        return self.low_rank()

    def low_rank(self) -> LowRank:
        """Give scale * B A as factors in float32, the scale in B."""
        out, *rest = self.shape
        lora_B = self.lora_B.detach().float().reshape(out, self.rank) * self.scale
        return LowRank(lora_B, self.lora_A.reshape(self.rank, prod(rest)), self.shape)


class Lora(Method):
    """LoRA through PEFT."""

    settings_type: ClassVar[type[MethodSettings]] = LoraSettings
    layer_type: ClassVar[type[LoraLayer]] = LoraLayer
    use_dora: ClassVar[bool] = False
    # our name of a tensor -> where PEFT's layer keeps it
    places: ClassVar[Mapping[str, str]] = {"lora_A": "lora_A", "lora_B": "lora_B"}

    settings: LoraSettings

    def __init__(self, settings: MethodSettings) -> None:
        super().__init__(settings)
        self._layers: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()
        self._trainable_before: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
        self._patterns_met: set[str] = set()

    def attach(self, model: nn.Module, layers: Mapping[str, str]) -> None:
        """Put fresh factors on layers of a model: A drawn as PEFT does, B zero; see `Method.attach`.

        Raises:
            MethodError: no layer, a layer of a kind that cannot be adapted, or a model that carries adapters already.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not layers:
            raise MethodError(f"{self.settings.name} was given no layer to adapt")
        for live in layers:
            if not is_adaptable(model.get_submodule(live)):
                kind = type(model.get_submodule(live)).__name__
                raise MethodError(
                    f"{self.settings.name} cannot adapt {live} ({kind}): no linear layer or 2-D convolution"
                )
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise MethodError(
                f"this {type(model).__name__} carries adapters of PEFT or diffusers already; unload them first"
            )
        ranks = {live: self._rank(disk) for live, disk in layers.items()}
        alphas = {live: self._alpha(disk, ranks[live]) for live, disk in layers.items()}
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        config = LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.rank,
            target_modules="|".join(
                map(re.escape, layers)
            ),  # PEFT takes a string as a regex on the whole name
            rank_pattern={"^" + re.escape(live): rank for live, rank in ranks.items()},
            alpha_pattern={"^" + re.escape(live): alpha for live, alpha in alphas.items()},
            lora_dropout=self.settings.dropout,
            use_rslora=self.settings.rslora,
            use_dora=self.use_dora,
        )
        # diffusers' and transformers' own door lets their saving and loading know of the adapter
        add_adapter: Any = getattr(model, "add_adapter", None)
        if add_adapter is not None:
            add_adapter(config, adapter_name=ADAPTER_NAME)
        else:
            inject_adapter_in_model(config, model, ADAPTER_NAME)
        model.requires_grad_(False)
        self._layers[model] = dict(layers)
        self._trainable_before[model] = before
        for parameter in self.parameters(model).values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Give the factors by "<live layer name>.lora_A" and so on; see `Method.parameters`."""
        found: dict[str, nn.Parameter] = {}
        for live in self._attached(model):
            for name, place in self.places.items():
                found[f"{live}.{name}"] = getattr(model.get_submodule(live), place)[ADAPTER_NAME].weight
        return found

    def layer_adapters(self, model: nn.Module) -> dict[str, LayerAdapter]:
        """Copy the trained state out, float32 on the CPU; see `Method.layer_adapters`."""
        copies: dict[str, LayerAdapter] = {}
        for live, disk in self._attached(model).items():
            layer: Any = model.get_submodule(live)
            tensors = {
                name: getattr(layer, place)[ADAPTER_NAME].weight.detach().cpu().float().clone().contiguous()
                for name, place in self.places.items()
            }
            alpha = float(layer.lora_alpha[ADAPTER_NAME])
            copies[disk] = self.layer_type(**tensors, alpha=alpha, rslora=self.settings.rslora)
        return copies

    def start_from(self, model: nn.Module, layer_adapters: Mapping[str, LayerAdapter]) -> None:
        """Set the factors from an adapter's; where its scale differs, B is rescaled so that the effect is the same.

        Raises:
            MethodError: other layers, ranks or another method than what was attached.
        """
        attached = self.layer_adapters(model)
        if missing := sorted(attached.keys() ^ layer_adapters.keys()):
            side = "the adapter lacks" if missing[0] in attached else "the method does not train"
            raise MethodError(
                f"cannot start from this adapter: {len(missing)} layers differ; {side} {missing[0]!r}; "
                f"choose the targets that it was trained with"
            )
        for disk, ours in attached.items():
            theirs = layer_adapters[disk]
            if theirs.method != ours.method or not isinstance(theirs, LoraLayer):
                raise MethodError(
                    f"{disk} is {theirs.method} in the adapter, but {ours.method} is to be trained"
                )
            for name, tensor in ours.tensors.items():
                if theirs.tensors[name].shape != tensor.shape:
                    raise MethodError(
                        f"{disk} has {name} {tuple(theirs.tensors[name].shape)} in the adapter (rank {theirs.rank}), "
                        f"but {tuple(tensor.shape)} is to be trained; set method.rank or method.rank_pattern alike"
                    )
        parameters = self.parameters(model)
        with torch.no_grad():
            for live, disk in self._attached(model).items():
                theirs, ours = layer_adapters[disk], attached[disk]
                assert isinstance(theirs, LoraLayer)
                assert isinstance(ours, LoraLayer)
                for name, tensor in theirs.tensors.items():
                    factor = theirs.scale / ours.scale if name == "lora_B" else 1.0
                    parameters[f"{live}.{name}"].copy_(tensor.float() * factor)

    @contextmanager
    def switched_off(self, model: nn.Module) -> Iterator[None]:
        """Let the model compute as the frozen base within a with block."""
        parameters = list(self.parameters(model).values())
        learns = [parameter.requires_grad for parameter in parameters]
        layers: list[Any] = [model.get_submodule(live) for live in self._attached(model)]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            # PEFT's switch also decides what learns
            for parameter, flag in zip(parameters, learns, strict=True):
                parameter.requires_grad_(flag)

    def detach(self, model: nn.Module) -> None:
        """Put the frozen layers back in their places."""
        for live in self._attached(model):
            wrapper: Any = model.get_submodule(live)
            parent, _, leaf = live.rpartition(".")
            setattr(model.get_submodule(parent), leaf, wrapper.get_base_layer())
        del self._layers[model]
        if hasattr(model, "peft_config"):
            del model.peft_config
        if getattr(model, "_hf_peft_config_loaded", False):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]  # what add_adapter had set
        before = self._trainable_before.pop(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])

    @property
    def unused_patterns(self) -> frozenset[str]:
        """Rank and alpha patterns that named none of the layers attached so far."""
        return frozenset([*self.settings.rank_pattern, *self.settings.alpha_pattern]) - self._patterns_met

    def _rank(self, disk: str) -> int:
        return int(self._first_match(self.settings.rank_pattern, disk, self.settings.rank))

    def _alpha(self, disk: str, rank: int) -> float:
        default = rank if self.settings.alpha is None else self.settings.alpha
        return self._first_match(self.settings.alpha_pattern, disk, default)

    def _first_match(self, patterns: Mapping[str, float], disk: str, default: float) -> float:
        for pattern, value in patterns.items():
            if matches(disk, pattern):
                self._patterns_met.add(pattern)
                return value
        return default

    def _attached(self, model: nn.Module) -> dict[str, str]:
        try:
            return self._layers[model]
        except KeyError:
            raise MethodError(
                f"{self.settings.name} is not attached to this {type(model).__name__}"
            ) from None


def _joined(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _joined(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
