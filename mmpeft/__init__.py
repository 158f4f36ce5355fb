"""Train small adapters on big frozen models and compose them exactly.

The public names are imported when they are first used: `import mmpeft` itself loads neither torch nor diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmpeft.adapter import Adapter as Adapter
    from mmpeft.adapter import load_adapter as load_adapter
    from mmpeft.adapter_card import AdapterCard as AdapterCard
    from mmpeft.baking import BakeReport as BakeReport
    from mmpeft.baking import bake as bake
    from mmpeft.bank import AdapterBank as AdapterBank
    from mmpeft.bank import attach as attach
    from mmpeft.composition.compose import compose as compose
    from mmpeft.composition.interference import interference as interference
    from mmpeft.config import Recipe as Recipe
    from mmpeft.errors import MmpeftError as MmpeftError
    from mmpeft.exporting import export as export
    from mmpeft.trainers.plan import plan as plan
    from mmpeft.trainers.training import TrainResult as TrainResult
    from mmpeft.trainers.training import train as train

__version__ = "0.1.0"

_PLACES = {
    "Adapter": "mmpeft.adapter:Adapter",
    "AdapterBank": "mmpeft.bank:AdapterBank",
    "AdapterCard": "mmpeft.adapter_card:AdapterCard",
    "BakeReport": "mmpeft.baking:BakeReport",
    "MmpeftError": "mmpeft.errors:MmpeftError",
    "Recipe": "mmpeft.config:Recipe",
    "TrainResult": "mmpeft.trainers.training:TrainResult",
    "attach": "mmpeft.bank:attach",
    "bake": "mmpeft.baking:bake",
    "compose": "mmpeft.composition.compose:compose",
    "export": "mmpeft.exporting:export",
    "interference": "mmpeft.composition.interference:interference",
    "load_adapter": "mmpeft.adapter:load_adapter",
    "plan": "mmpeft.trainers.plan:plan",
    "train": "mmpeft.trainers.training:train",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'mmpeft' has no attribute {name!r}")
    module, attribute = _PLACES[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
