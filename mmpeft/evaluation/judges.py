"""Small convolutional judges of 64-pixel pictures: which style, which concept.

They come with the pocket base (weights in mmpeft/pocket/judges) and are only good for pictures like its own.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

STYLES = ("base", "fluent-3d", "high-contrast", "fluent-flat")
"""the style judge's classes, in its order"""
SIDE = 64
"""pixels of a side of what a judge sees"""


class Judge(nn.Module):
    """Classify 64-pixel pictures: four stride-2 stages, then average and maximum pooling into one linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        widths = (3, 32, 64, 128, 192)
        for inside, outside in pairwise(widths):
            stages += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.BatchNorm2d(outside), nn.SiLU()]
            stages += [
                nn.Conv2d(outside, outside, 3, padding=1, groups=8),
                nn.BatchNorm2d(outside),
                nn.SiLU(),
            ]
        self.features = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1] * 4 + widths[-1], classes)
        self.drop = nn.Dropout(0.2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Score each class.

        Args:
            pixels: (B, 3, 64, 64), float32, in [-1, 1].

        Returns:
            Logits, (B, classes).
        """
        features = self.features(pixels)
        pooled = [F.adaptive_avg_pool2d(features, 2).flatten(1), features.amax((2, 3))]
        logits: Tensor = self.head(self.drop(torch.cat(pooled, 1)))
        return logits


def load_judge(weights: Path, classes: int) -> Judge:
    """Load a judge's weights from a safetensors file, in evaluation mode."""
    judge = Judge(classes)
    judge.load_state_dict(load_file(weights))
    return judge.eval()


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """Stack pictures for a judge: (B, 3, 64, 64), float32, in [-1, 1]; other sizes are box-resized."""
    small = [image.convert("RGB") for image in images]
    small = [
        image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.BOX)
        for image in small
    ]
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in small])
    return torch.from_numpy(stacked / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def named(judge: Judge, images: Sequence[Image.Image]) -> list[int]:
    """Give the class that a judge puts first for each picture."""
    classes: list[int] = judge(pixels_of(images)).argmax(1).tolist()
    return classes


class PocketJudges:
    """The style judge and the concept judge that ship with the pocket base."""

    def __init__(self, folder: Path) -> None:
        self.concepts: list[str] = json.loads((folder / "concept_judge.json").read_text())
        self._style = load_judge(folder / "style_judge.safetensors", len(STYLES))
        self._concept = load_judge(folder / "concept_judge.safetensors", len(self.concepts))
        self.digests = {
            name: sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
            for name in ("style_judge", "concept_judge")
        }

    def style_is(self, images: Sequence[Image.Image], style: str) -> list[bool]:
        """Say for each picture whether the style judge puts this style first."""
        wanted = STYLES.index(style)
        return [found == wanted for found in named(self._style, images)]

    def content_is(self, images: Sequence[Image.Image], concepts: Sequence[str]) -> list[bool]:
        """Say for each picture whether the concept judge names its concept rightly, among all its concepts."""
        found = named(self._concept, images)
        return [self.concepts[index] == concept for index, concept in zip(found, concepts, strict=True)]
