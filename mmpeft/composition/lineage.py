"""Where a composed adapter comes from, as its card tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import mmpeft
from mmpeft.adapter_card import AdapterCard
from mmpeft.backbones.fingerprint import Fingerprint
from mmpeft.composition.parents import Parents
from mmpeft.mix import Weight


def card(parents: Parents, weights: Sequence[Weight], recipe: Mapping[str, Any]) -> AdapterCard:
    """Write the card of a composed adapter: what its parents have in common, who they are, how it was made.

    Args:
        recipe: what `replay` needs besides the parents.
    """
    cards = [adapter.card for adapter in parents]
    base, fingerprint = _common_base(parents)
    triggers = dict.fromkeys(card.trigger for card in cards if card.trigger)
    return AdapterCard(
        base=base,
        fingerprint=fingerprint,
        trigger=", ".join(triggers) or None,
        recipe=recipe,
        versions={"mmpeft": mmpeft.__version__, "torch": version("torch")},
        parents=tuple(
            {
                "digest": adapter.digest,
                "weight": weight_json(weight),
                "base": adapter.card.base,
                "trigger": adapter.card.trigger,
                "methods": sorted({layer.method for layer in adapter.values()}),
            }
            for adapter, weight in zip(parents, weights, strict=True)
        ),
    )


def _common_base(parents: Parents) -> tuple[str, dict[str, Any] | None]:
    """Give the base's name and fingerprint where all parents that tell of one tell of the same."""
    names = list(dict.fromkeys(adapter.card.base for adapter in parents if adapter.card.base))
    known = [
        Fingerprint.from_json(adapter.card.fingerprint) for adapter in parents if adapter.card.fingerprint
    ]
    if not known:
        return names[0] if len(names) == 1 else "", None
    if parents.check_bases():
        return "", None
    layers = {name: sketch for fingerprint in reversed(known) for name, sketch in fingerprint.layers.items()}
    prediction = next((fingerprint.prediction for fingerprint in known if fingerprint.prediction), "")
    # one base under several names: the first one's
    return names[0] if names else "", Fingerprint(prediction, dict(sorted(layers.items()))).to_json()


def weight_json(weight: Weight) -> float | dict[str, Any]:
    """Write a constant adapter weight as a card has it: a number, or one with factors per block."""
    if not weight.blocks:
        return weight.value
    return {"value": weight.value, "blocks": [list(block) for block in weight.blocks]}


def weight_of(written: Any) -> Weight:
    """Read an adapter weight as a card has it."""
    if isinstance(written, Mapping):
        return Weight(written["value"], tuple((pattern, factor) for pattern, factor in written["blocks"]))
    return Weight.of(written)


def describe(parent: Mapping[str, Any]) -> str:
    """Name a parent that is not there by what the card tells of it."""
    facts = [", ".join(parent.get("methods", ()))]
    facts += [f"on {parent['base']}"] if parent.get("base") else []
    facts += [f"trigger {parent['trigger']!r}"] if parent.get("trigger") else []
    return f"{parent.get('digest', 'one without a digest')} ({' '.join(filter(None, facts))})"
