"""The contract of a method: how trainable parameters get onto a frozen model, and what they are once trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

from torch import nn

from mmpeft.config import PluginSettings
from mmpeft.layer_adapter import LayerAdapter


class MethodSettings(PluginSettings):
    """What every method that changes layers is told."""

    targets: tuple[str, ...] = ("attention",)
    """target groups of the backbone (attention, attention+mlp, all, ...) or patterns on layer names with * and ?"""


class Method(ABC):
    """Attaches trainable parameters to the layers of frozen models and turns their trained state into LayerAdapters.

    One object serves a whole run; each call says which model it is about. Layer names are live names in that
    model's module tree, as `model.get_submodule` takes them.
    """

    settings_type: ClassVar[type[MethodSettings]]

    def __init__(self, settings: MethodSettings) -> None:
        self.settings = settings

    @abstractmethod
    def attach(self, model: nn.Module, layers: Mapping[str, str]) -> None:
        """Put fresh trainable float32 parameters, drawn from the global generator, on layers of a model.

        The model's output is unchanged until a step is taken. Everything else in the model is frozen.

        Args:
            layers: live layer name -> layer name on disk without the component (patterns are matched on it).

        Raises:
            MethodError: a layer is of a kind that the method cannot adapt.
        """

    @abstractmethod
    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Give the trainable parameters by name, "<live layer name>.<tensor name>", in a fixed order."""

    @abstractmethod
    def layer_adapters(self, model: nn.Module) -> dict[str, LayerAdapter]:
        """Copy the trained state out, by layer name on disk without the component."""

    @abstractmethod
    def start_from(self, model: nn.Module, layer_adapters: Mapping[str, LayerAdapter]) -> None:
        """Set the attached parameters from an adapter's, given by layer name on disk without the component.

        Raises:
            MethodError: other layers, ranks or another method than what was attached, with both named.
        """

    @abstractmethod
    def switched_off(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let the model compute as the frozen base within a with block."""

    @abstractmethod
    def detach(self, model: nn.Module) -> None:
        """Leave the model as it was found."""

    @property
    def unused_patterns(self) -> frozenset[str]:
        """Patterns in the settings that named none of the layers attached so far; in vain if no component uses them."""
        return frozenset()
