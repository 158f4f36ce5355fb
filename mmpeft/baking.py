"""Bake a mix into a base on disk: fused weights as a full model folder or a single file.

fused = round(float32(W) + sum of the changes), rounded once, to the type in the file. The base is streamed tensor by
tensor and never opened as a model, so memory is bounded by its largest layer.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mmpeft
from mmpeft.adapter import Adapter, load_adapter
from mmpeft.backbones.fingerprint import Fingerprint, LayerSketch, compare
from mmpeft.baked_output import Output
from mmpeft.composition.lineage import weight_json
from mmpeft.composition.parents import titles_of
from mmpeft.composition.report import Errors, percent
from mmpeft.disk.base_files import BaseFiles, open_base
from mmpeft.disk.weights_stream import FLOAT_TYPES
from mmpeft.errors import ConfigError
from mmpeft.fused_weights import Changes, Ingredient, Losses, find_changes, rewritten
from mmpeft.mix import Weight


@dataclass(frozen=True)
class BakeReport:
    """What baking did.

    Args:
        out: the folder or file that was written.
        lost: the share of the change that rounding to the file's type lost: the number is that of all layers, `.layers`
            that of each. Where a folder holds the model in several types, the largest.
        types: the types of the changed weights, in safetensors' words ("BF16").
        bytes: size of all that was written.
        notes: sentences that a person should read.
        seconds: of work.
    """

    out: Path
    adapters: int
    lost: Errors
    types: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...]
    seconds: float

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that changed, sorted."""
        return tuple(sorted(self.lost.layers))

    def text(self) -> str:
        """Give the report for a terminal."""
        what = "1 adapter" if self.adapters == 1 else f"{self.adapters} adapters"
        counts = Counter(layer.partition(".")[0] for layer in self.layers)
        where = ", ".join(f"{count} of {component}" for component, count in sorted(counts.items()))
        lines = [
            f"baked {what} into {self.out} in {self.seconds:.1f} s: {len(self.layers)} layers changed ({where}), "
            f"{self.bytes / 1e6:,.1f} MB written",
            f"lost by rounding to {' and '.join(self.types)}: {percent(self.lost)} of the change",
        ]
        if self.lost:
            most = sorted(self.lost.layers.items(), key=lambda item: -item[1])[:5]
            lines += [f"  {percent(share):>7}  {layer}" for layer, share in most]
        return "\n".join([*lines, *(f"look at this: {note}" for note in self.notes)])


def bake(
    base: str | Path,
    mix: Mapping[str, Any] | Sequence[tuple[Adapter | str | Path, Any]],
    out: str | Path,
    *,
    strict_base: bool = False,
) -> BakeReport:
    """Write a base with adapters fused into its weights; the result loads wherever the base did.

    Everything else of the base is copied byte for byte, header, metadata and order of its weight files included. A file
    `mmpeft_bake.json` beside tells what went in, by digests, so that it can be made again. The result appears whole or
    not at all.

    Args:
        base: a diffusers folder, the folder of one component or of a transformers model, a single-file checkpoint of
            Stable Diffusion (.safetensors), "pocket", or the name of a hub base that is in the cache.
        mix: adapter path -> weight, or (adapter or path, weight) pairs; a weight is a number, or factors per component
            or block as `Weight.of` takes them, or a `Weight` that does not vary.
        out: a new folder, or for a single file a new .safetensors file; an earlier bake is replaced.
        strict_base: refuse adapters of another fine-tune of this base; they are baked with a warning otherwise.

    Raises:
        ConfigError: a weight that varies or is none, nothing to bake, or `out` holds something else.
        BaseError: the base cannot be read, is quantised where it would change, or the result cannot be written.
        AdapterError: an adapter cannot be read.
        BaseMismatch: an adapter does not fit the base.
        MethodError: an adapter's method is no change of weights, or the result would not be finite.
    """
    started = time.perf_counter()
    files, pairs = open_base(base), _pairs(mix)
    ingredients = _ingredients(pairs, files)
    changes = find_changes(files, ingredients)
    if not changes:
        raise ConfigError("there is nothing to bake: every adapter weight is 0, or no adapter was given")
    output = Output(files, Path(out))
    output.check([Path(given) for given, _ in pairs if not isinstance(given, Adapter)])
    fingerprint = _look_at_base(files, ingredients, changes, strict_base)
    components = {change.layer.partition(".")[0] for each in changes.values() for change in each}
    copied, stale = output.copied(components)
    size = sum((files.path if files.is_file else files.path / path).stat().st_size for path in copied)
    losses = Losses({})
    with output.whole(size) as fresh:
        digests = _write(files, fresh, copied, changes, losses)
        lineage = _lineage(output, ingredients, fingerprint, digests)
        (fresh / output.lineage).write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")
    return BakeReport(
        out=output.path,
        adapters=len(ingredients),
        lost=Errors.of(losses.layers),
        types=tuple(sorted({slot.dtype for slot in changes})),
        bytes=size,
        notes=tuple(_notes(files, changes, stale)),
        seconds=time.perf_counter() - started,
    )


def _pairs(mix: Any) -> list[tuple[Adapter | str | Path, Any]]:
    is_pairs = isinstance(mix, Sequence) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in mix)
    if not is_pairs and (isinstance(mix, Adapter) or not isinstance(mix, Mapping)):
        raise ConfigError(
            "a mix is a mapping of adapter paths to weights, or (adapter or path, weight) pairs"
        )
    return list(mix if is_pairs else mix.items())


def _ingredients(pairs: Sequence[tuple[Any, Any]], base: BaseFiles) -> list[Ingredient]:
    titles = titles_of([adapter for adapter, _ in pairs])
    found = []
    for title, (given, said) in zip(titles, pairs, strict=True):
        if not isinstance(given, Adapter | str | Path):
            raise ConfigError(f"an adapter or the path of one is needed; got {type(given).__name__}")
        adapter = given if isinstance(given, Adapter) else load_adapter(given, base_shapes=base.shapes)
        try:
            weight = Weight.of(said)
            weight.check({*adapter.layers, *base.shapes})
        except ConfigError as error:
            raise ConfigError(f"the weight of {title}: {error}") from error
        if weight.varies:
            raise ConfigError(
                f"the weight of {title} varies with time, place, sample or branch, and baked weights are one set of "
                f"numbers; give a number or numbers per block, or mix live with a bank"
            )
        found.append(Ingredient(title, adapter, weight))
    return found


def _look_at_base(
    base: BaseFiles, ingredients: Sequence[Ingredient], changes: Changes, strict: bool
) -> Fingerprint:
    """Read what will change once, a layer at a time, before anything is written.

    Returns:
        The base's fingerprint at the layers that change.

    Raises:
        BaseMismatch: an adapter was trained on another base.
        MethodError: an adapter's method is no change of weights.
    """
    tried: set[tuple[str, str]] = set()
    for slot, at_slot in changes.items():
        for change in at_slot:
            if (kind := (change.title, change.layer_adapter.method)) not in tried:
                tried.add(kind)
                change.delta(slot.read())
    sketches: dict[str, LayerSketch] = {}
    for layer in sorted({change.layer for at_slot in changes.values() for change in at_slot}):
        _sketch(base, layer, sketches)
    touched = Fingerprint(base.prediction, dict(sketches))
    for each in ingredients:
        if each.adapter.card.fingerprint is not None:
            trained = Fingerprint.from_json(each.adapter.card.fingerprint)
            for layer in trained.layers:
                _sketch(base, layer, sketches)
            known = {layer: sketch for layer, sketch in trained.layers.items() if layer in sketches}
            trained = Fingerprint(trained.prediction, known)
            here = Fingerprint(base.prediction or trained.prediction, sketches)
            verdict = compare(trained, here)
            said = verdict.judge(each.title, each.adapter.card.base, base.title, strict=strict)
            if said:
                warnings.warn(said, stacklevel=3)
    return touched


def _sketch(base: BaseFiles, layer: str, sketches: dict[str, LayerSketch]) -> None:
    slots = base.slots(layer)
    if layer not in sketches and slots and slots[0].dtype in FLOAT_TYPES and len(slots[0].shape) > 1:
        sketches |= Fingerprint.of({layer: slots[0].read()}, "").layers


def _write(
    base: BaseFiles, fresh: Path, copied: Sequence[Path], changes: Changes, losses: Losses
) -> dict[str, str]:
    """Write all files of the result into a folder; give the SHA-256 of the changed ones, by name."""
    changed = {slot.file.path: slot.file for slot in changes}
    digests = {}
    for relative in copied:
        source = base.path if base.is_file else base.path / relative
        (fresh / relative).parent.mkdir(parents=True, exist_ok=True)
        if source in changed:
            edits = rewritten(changed[source], changes, losses)
            digests[relative.as_posix()] = changed[source].rewrite(fresh / relative, edits)
        else:
            shutil.copyfile(source, fresh / relative)
    return digests


def _lineage(
    output: Output, ingredients: Sequence[Ingredient], fingerprint: Fingerprint, digests: Mapping[str, str]
) -> dict[str, Any]:
    """Tell what went in, by digests and without a path; with the same things `bake` gives the same bytes."""
    base = output.base
    return {
        "format": 1,
        "base": {"title": base.title, "fingerprint": fingerprint.to_json(), "baked": output.earlier},
        "adapters": [
            {
                "digest": each.adapter.digest,
                "weight": weight_json(each.weight),
                "base": each.adapter.card.base,
                "trigger": each.adapter.card.trigger,
            }
            for each in ingredients
        ],
        "sha256": dict(sorted(digests.items())),
        "versions": {"mmpeft": mmpeft.__version__, "torch": version("torch")},
    }


def _notes(base: BaseFiles, changes: Changes, stale: Sequence[Path]) -> Iterator[str]:
    touched = {base.weight_of(change.layer) for each in changes.values() for change in each}
    for head, embedding in base.tied.items():
        if embedding in touched or head in touched:
            yield (
                f"{head} and {embedding} are one weight in this base, so input and output change together; to change "
                f"one of them alone, untie them first"
            )
    if stale:
        names = ", ".join(str(path) for path in stale[:5]) + (", ..." if len(stale) > 5 else "")
        yield f"left out, as they hold the unchanged weights: {names}"
