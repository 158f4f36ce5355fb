"""The page that people and the hub read about an adapter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmpeft.adapter_card import AdapterCard
from mmpeft.layer_adapter import LayerAdapter, by_component

_LOAD_AND_MIX = 'bank.load("path/to/this/folder", name="this")\nbank.mix(this=0.8)'
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def model_card(
    layers: Mapping[str, LayerAdapter], card: AdapterCard, files: Sequence[str] = (), is_plain: bool = True
) -> str:
    """Write README.md: the hub's header, what the adapter is, how to use it, how it was made.

    Args:
        layers: by layer name with the component in front.
        files: names of further files in the folder; pictures are shown.
        is_plain: whether plain diffusers and PEFT load it.
    """
    components = tuple(by_component(layers))
    is_image = any(component in components for component in ("unet", "transformer"))
    parts = [
        _header(layers, card, is_image),
        f"# {'Text-to-image' if is_image else 'Language'} adapter for {card.base or 'an unnamed base'}",
        _summary(layers, card),
        (_usage_of_diffusers(card) if is_image else _usage_of_peft(components[0]))
        if is_plain
        else _usage_of_lycoris(),
    ]
    if pictures := [name for name in files if name.lower().endswith(_PICTURES)]:
        parts.append("## Pictures\n\n" + "\n".join(f"![{name}]({name})" for name in pictures))
        parts += [_table(card.preview)] if card.preview else []
    if card.parents:
        parts.append(_lineage(card))
    for title, values in (("Figures", card.metrics), ("Recipe", card.recipe), ("Made with", card.versions)):
        if values:
            parts.append(f"## {title}\n\n{_table(values)}")
    return "\n\n".join(parts) + "\n"


def _header(layers: Mapping[str, LayerAdapter], card: AdapterCard, is_image: bool) -> str:
    methods = sorted({layer.method for layer in layers.values()})
    lines = [f"library_name: {'diffusers' if is_image else 'peft'}"]
    if card.base.count("/") == 1:  # only hub names make a valid base_model
        lines.append(f"base_model: {card.base}")
    if is_image:
        lines.append("pipeline_tag: text-to-image")
    if card.trigger:
        lines.append(f"instance_prompt: {json.dumps(card.trigger, ensure_ascii=False)}")
    lines.append("tags:")
    tags = [*methods, "mmpeft", *(["lora"] if methods == ["dora"] else [])]
    tags += ["diffusers", "text-to-image", "diffusers-training"] if is_image else []
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _summary(layers: Mapping[str, LayerAdapter], card: AdapterCard) -> str:
    methods = Counter(layer.method for layer in layers.values())
    numbers = sum(tensor.numel() for layer in layers.values() for tensor in layer.tensors.values())
    lines = [
        f"- method: {', '.join(f'{name} on {count} layers' for name, count in sorted(methods.items()))}",
        f"- components: {', '.join(by_component(layers))}",
        f"- numbers: {numbers:,}",
    ]
    if card.trigger:
        lines.append(f"- trigger: `{card.trigger}`: write it in the prompt")
    if card.steps is not None:
        lines.append(f"- steps: {card.steps}, seed {card.seed}")
    if card.data_digest:
        lines.append(f"- data: `{card.data_digest}`")
    return "\n".join(lines)


def _usage_of_peft(component: str) -> str:
    code = (
        "from peft import PeftModel\n\n"
        f'model = PeftModel.from_pretrained(model, "path/to/this/folder/peft/{component}")'
    )
    return f"## Use\n\n```python\n{code}\n```"


def _usage_of_diffusers(card: AdapterCard) -> str:
    is_hub_name = card.base.count("/") == 1
    base = json.dumps(card.base if is_hub_name else f"path/to/{card.base or 'the/base'}")
    prompt = json.dumps(f"a house, {card.trigger}" if card.trigger else "a house", ensure_ascii=False)
    code = (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({base})\n"
        'pipe.load_lora_weights("path/to/this/folder")\n'
        f"picture = pipe({prompt}).images[0]"
    )
    ours = f"import mmpeft\n\nbank = mmpeft.attach(pipe)\n{_LOAD_AND_MIX}"
    return f"## Use\n\n```python\n{code}\n```\n\nTo mix it with others at chosen strengths:\n\n```python\n{ours}\n```"


def _usage_of_lycoris() -> str:
    code = f"import mmpeft\n\nbank = mmpeft.attach(pipe)  # the base, a pipeline or a model\n{_LOAD_AND_MIX}"
    words = (
        "Plain diffusers does not load this method. `mmpeft convert` writes the file for ComfyUI and A1111, or makes "
        "it LoRA at an error that it tells."
    )
    return f"## Use\n\n```python\n{code}\n```\n\n{words}"


def _lineage(card: AdapterCard) -> str:
    """Tell the parents of a composed adapter, and the command that makes it from them again."""
    rows = ["| parent | weight | method | base | trigger |", "|---|---|---|---|---|"]
    for parent in card.parents:
        cells = [
            f"`{parent.get('digest', '')}`",
            json.dumps(parent.get("weight"), ensure_ascii=False),
            ", ".join(parent.get("methods", ())),
            parent.get("base") or "",
            parent.get("trigger") or "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    names = " ".join(f"PARENT_{number}" for number in range(1, len(card.parents) + 1))
    command = f"mmpeft compose --like path/to/this/folder {names} --out again"
    again = f"The same again, from the parents in any order:\n\n```\n{command}\n```"
    return "## Composed from\n\n" + "\n".join(rows) + f"\n\n{again}"


def _table(values: Any) -> str:
    rows = [f"| {key} | {json.dumps(value, ensure_ascii=False)} |" for key, value in sorted(values.items())]
    return "\n".join(["| | |", "|---|---|", *rows])
