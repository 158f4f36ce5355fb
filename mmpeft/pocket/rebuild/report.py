"""Measure a rebuilt base: how many of its pictures does its concept judge name rightly?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpeft.evaluation.judges import load_judge, named
from mmpeft.pocket.rebuild.colours import COLOUR_WORDS, HUES, is_kept_unseen, main_hue
from mmpeft.pocket.rebuild.drawings import Pixels

BATCH = 32
PAIRS = 64
"""pairs of concept and colour that were kept unseen, at most"""


def measure_base(pocket: Path, names: Sequence[str], *, sampling_steps: int, seed: int) -> dict[str, float]:
    """Generate every concept once, and some in colours that they were never shown in.

    Args:
        pocket: folder that `assemble` wrote.
        names: the taught concepts.

    Returns:
        `named_rightly`, `unseen_named_rightly` and `unseen_coloured_rightly`, shares in [0, 1]; the last two are
        absent when no pair of these concepts was kept unseen.
    """
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(pocket / "sd").to(dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_judge(pocket / "judges" / "concept_judge.safetensors", len(names))

    def generate(prompts: Sequence[str]) -> list[Any]:
        pictures: list[Any] = []
        for start in range(0, len(prompts), BATCH):
            some = list(prompts[start : start + BATCH])
            noise = [torch.Generator().manual_seed(seed + start + index) for index in range(len(some))]
            with torch.autocast("cpu", torch.bfloat16):
                made = pipeline(some, num_inference_steps=sampling_steps, guidance_scale=4.0, generator=noise)
            pictures += made.images
        return pictures

    def rightly(pictures: Sequence[Any], wanted: Sequence[str]) -> float:
        found = named(judge, pictures)
        return float(np.mean([names[index] == name for index, name in zip(found, wanted, strict=True)]))

    report = {"named_rightly": rightly(generate(names), names)}
    if pairs := unseen_pairs(names, seed):
        pictures = generate([f"{colour} {name}" for name, colour in pairs])
        report["unseen_named_rightly"] = rightly(pictures, [name for name, _ in pairs])
        right = [
            _has_hue(np.asarray(p), HUES[colour]) for p, (_, colour) in zip(pictures, pairs, strict=True)
        ]
        report["unseen_coloured_rightly"] = float(np.mean(right))
    return report


def unseen_pairs(names: Sequence[str], seed: int) -> list[tuple[str, str]]:
    """List pairs of concept and colour word that no training picture showed, at most 64."""
    pairs = [
        (name, colour)
        for name in names
        for colour in HUES
        if is_kept_unseen(name, colour) and COLOUR_WORDS.isdisjoint(name.split())
    ]
    order = np.random.default_rng(seed).permutation(len(pairs))[:PAIRS]
    return [pairs[index] for index in order]


def _has_hue(picture: Pixels, hue: float) -> bool:
    is_drawn = (255 - picture).max(2) > 25  # the page is white
    alpha = np.where(is_drawn, 255, 0).astype(np.uint8)
    found, _, _ = main_hue(np.dstack([picture, alpha]))
    return abs((found - hue + 180) % 360 - 180) < 30
