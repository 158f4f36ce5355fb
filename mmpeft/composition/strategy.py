"""A strategy as its signature tells it: which settings it has, which it was given, and how one layer is put to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_type_hints

from mmpeft import plugins, randomness
from mmpeft.delta import Delta, check_truncation
from mmpeft.errors import ConfigError

# Settings that say how much of a result is kept.
_TRUNCATIONS = ("rank", "error", "energy")
Deltas = Sequence[tuple[Delta, float]]


@dataclass(frozen=True)
class Setting:
    """One setting of a strategy, from its signature and its docstring."""

    name: str
    type: Any
    default: Any
    says: str


@dataclass(frozen=True)
class Strategy:
    """A strategy with all of its settings; made by `Strategy.of`.

    Args:
        settings: every setting of its own but the truncations, defaults included.
        rank: the most that a result's rank may be.
        error: the largest relative error of a truncated result.
        energy: the share of ‖result‖² to keep; only of strategies that name it.
    """

    name: str
    function: Callable[..., Delta]
    parameters: frozenset[str]
    settings: Mapping[str, Any]
    rank: int | None
    error: float | None
    energy: float | None

    @classmethod
    def of(
        cls, name: str, settings: Mapping[str, Any], *, rank: int | None = None, error: float | None = None
    ) -> Self:
        """Look a strategy up and check its settings.

        Raises:
            ConfigError: an unknown strategy or setting, or a value of another type or out of range.
        """
        function = plugins.get("strategy", name)
        check_truncation(rank=rank, error=error)
        known = {setting.name: setting for setting in settings_of(function)}
        own = {each: setting for each, setting in known.items() if each not in ("rank", "error")}
        for key, value in settings.items():
            if key not in own:
                hint = plugins.near_miss(key, list(own)) or "; it has none"
                raise ConfigError(f"the strategy {name} has no setting called {key!r}{hint}")
            _check(name, own[key], value)
        complete = {each: settings.get(each, setting.default) for each, setting in own.items()}
        energy = complete.pop("energy", None)
        return cls(name, function, _parameters(function), complete, rank, error, energy)

    @property
    def truncates(self) -> bool:
        """Whether results are to be truncated at all."""
        return (self.rank, self.error, self.energy) != (None, None, None)

    @property
    def truncates_itself(self) -> bool:
        """Whether the function names a truncation that is asked for, and so does it in its own way."""
        return any(getattr(self, each) is not None and each in self.parameters for each in _TRUNCATIONS)

    @property
    def left_to_truncate(self) -> dict[str, Any]:
        """The truncations that are asked for and that the function does not name."""
        asked = {each: getattr(self, each) for each in ("rank", "error") if each not in self.parameters}
        return {each: value for each, value in asked.items() if value is not None}

    def untruncated(self, deltas: Deltas, layer: str, seed: int) -> Delta:
        """Compose one layer without any truncation."""
        return self._call(deltas, layer, seed, {})

    def __call__(self, deltas: Deltas, layer: str, seed: int) -> Delta:
        """Compose one layer with the truncations that the function names itself."""
        own = {each: getattr(self, each) for each in _TRUNCATIONS if each in self.parameters}
        return self._call(deltas, layer, seed, own)

    def as_dict(self) -> dict[str, Any]:
        """Give name, settings, rank and error as plain JSON values."""
        energy = {} if self.energy is None else {"energy": self.energy}
        return {
            "strategy": self.name,
            "settings": {**self.settings, **energy},
            "rank": self.rank,
            "error": self.error,
        }

    def _call(self, deltas: Deltas, layer: str, seed: int, truncations: Mapping[str, Any]) -> Delta:
        draws = {"generator": randomness.generator(seed, layer)} if "generator" in self.parameters else {}
        return self.function(deltas, **self.settings, **truncations, **draws)


def settings_of(function: Callable[..., Any]) -> list[Setting]:
    """List a strategy's settings: its keyword-only parameters but the generator, with their docstring lines."""
    import docstring_parser

    says = {
        each.arg_name: " ".join((each.description or "").split())
        for each in docstring_parser.parse(function.__doc__ or "").params
    }
    types = get_type_hints(function)
    return [
        Setting(each.name, types.get(each.name, Any), each.default, says.get(each.name, ""))
        for each in inspect.signature(function).parameters.values()
        if each.kind is each.KEYWORD_ONLY and each.name != "generator"
    ]


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _check(strategy: str, setting: Setting, value: Any) -> None:
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(setting.type).validate_python(value, strict=True)
    except ValidationError as error:
        told = error.errors()[0]["msg"]
        raise ConfigError(f"{strategy}.{setting.name}: {told[0].lower()}{told[1:]}; got {value!r}") from error
