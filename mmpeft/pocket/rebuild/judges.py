"""Train the judges: which concept a picture shows, whatever its style, and which style it has."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.evaluation.judges import STYLES, Judge
from mmpeft.pocket.rebuild.augmentation import between, chance, warp
from mmpeft.pocket.rebuild.concepts import HELD_OUT, Concept
from mmpeft.pocket.rebuild.drawings import KNOWN_SETS, Drawings, put_on, to_tensor
from mmpeft.pocket.rebuild.training import fit
from mmpeft.randomness import generator, permutation, reseed_globals

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

STYLE_WEIGHTS = (0.5, 1.0, 1.0, 1.0)
"""weight of each style's loss: the base has two sets of drawings, the others one"""
DECODED_SHARE = 0.65
"""share of the style judge's pictures that went through the autoencoder, as generated pictures do"""


def train_concept_judge(
    drawings: Mapping[str, Drawings],
    names: Sequence[str],
    *,
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float = 3e-3,
) -> Judge:
    """Train on every style's drawings of the named concepts, heavily varied.

    Args:
        drawings: style -> its drawings.
        names: the judge's classes, in order.
    """
    reseed_globals(seed, "concept judge")
    draw = generator(seed, "concept judge")
    shown = [
        (drawing, names.index(name))
        for style in drawings.values()
        for drawing, name in zip(style.pixels, style.names, strict=True)
        if name in set(names)
    ]
    rgba = torch.stack([torch.from_numpy(drawing) for drawing, _ in shown]).permute(0, 3, 1, 2).float() / 255
    classes = torch.tensor([index for _, index in shown])
    judge = Judge(len(names))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=0.05)

    def batch_loss(progress: float) -> Tensor:
        chosen = torch.randint(0, len(rgba), (batch,), generator=draw)
        pictures = vary(rgba[chosen], draw).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(pictures)
        return F.cross_entropy(logits.float(), classes[chosen], label_smoothing=0.1)

    fit(
        batch_loss,
        judge,
        [optimizer],
        name="concept judge",
        steps=steps,
        warmup=50,
        floor=0.01,
        max_norm=None,
    )
    return judge.eval()


def vary(rgba: Tensor, draw: torch.Generator) -> Tensor:
    """Vary what a style may vary: background, geometry, colour, sharpness, contrast, grain.

    Args:
        rgba: (B, 4, 64, 64), in [0, 1].

    Returns:
        (B, 3, 64, 64), about [-1, 1].
    """
    count = len(rgba)

    def each(low: float = 0.0, high: float = 1.0, channels: int = 1) -> Tensor:
        return between(low, high, (count, channels, 1, 1), draw)

    page = torch.where(each() < 0.25, each(channels=3), torch.ones(count, 3, 1, 1))
    pictures = rgba[:, :3] * rgba[:, 3:] + page * (1 - rgba[:, 3:])
    if chance(draw) < 0.5:
        pictures = pictures.flip(3)
    pictures = warp(pictures, draw, shrink=(0.9, 1.25), turn=0.2, shift=0.15, stretch=(0.9, 1.1))
    gray, which = pictures.mean(1, keepdim=True), each()
    faded = gray + (pictures - gray) * each(0, 1.5)
    pictures = torch.where(which < 0.25, gray, torch.where(which < 0.5, faded, pictures))
    for index in range(0, count, 5):
        pictures[index] = pictures[index][torch.randperm(3, generator=draw)]
    if chance(draw) < 0.4:
        pictures = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = (pictures - 0.5) * each(0.7, 1.3) + 0.5 + each(-0.1, 0.1)
    grain = torch.randn(pictures.shape, generator=draw) * 0.08 * each()
    return (pictures + grain) * 2 - 1


def train_style_judge(
    drawings: Mapping[str, Drawings],
    concepts: Mapping[str, Concept],
    autoencoder: "AutoencoderKL",
    *,
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float = 2e-3,
) -> tuple[Judge, float]:
    """Train on taught and familiar concepts, without a random quarter of them and without `HELD_OUT`.

    Returns:
        The judge, and the share of the kept-out decoded pictures whose style it names rightly.
    """
    reseed_globals(seed, "style judge")
    draw = generator(seed, "style judge")
    known = [name for name, concept in concepts.items() if concept.tier != "named"]
    kept_out = {known[index] for index in permutation(len(known), seed, "style judge")[: len(known) // 4]}
    kept_out |= set(HELD_OUT)
    shown = [
        (drawing, STYLES.index("base" if style in KNOWN_SETS else style), name in kept_out)
        for style, drawn in drawings.items()
        for drawing, name in zip(drawn.pixels, drawn.names, strict=True)
        if name in set(known)
    ]
    real = to_tensor(put_on(drawing) for drawing, _, _ in shown)
    decoded = _through(autoencoder, real, draw)
    classes = torch.tensor([style for _, style, _ in shown])
    is_kept_out = torch.tensor([out for _, _, out in shown])
    trained_on = (~is_kept_out).nonzero()[:, 0]
    weights = torch.tensor(STYLE_WEIGHTS)
    judge = Judge(len(STYLES))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=1e-2)

    def batch_loss(progress: float) -> Tensor:
        chosen = trained_on[torch.randint(0, len(trained_on), (batch,), generator=draw)]
        is_decoded = between(0, 1, (batch, 1, 1, 1), draw) < DECODED_SHARE
        pictures = torch.where(is_decoded, decoded[chosen], real[chosen])
        if chance(draw) < 0.5:
            pictures = pictures.flip(3)
        down, right = torch.randint(-3, 4, (2,), generator=draw).tolist()
        pictures = torch.roll(pictures, (down, right), (2, 3))
        grain = torch.randn(pictures.shape, generator=draw) * 0.06 * between(0, 1, (batch, 1, 1, 1), draw)
        return F.cross_entropy(judge(pictures + grain), classes[chosen], weight=weights)

    fit(batch_loss, judge, [optimizer], name="style judge", steps=steps, warmup=1, floor=0.01, max_norm=None)
    judge.eval()
    return judge, accuracy(judge, decoded[is_kept_out], classes[is_kept_out])


@torch.no_grad()
def _through(autoencoder: "AutoencoderKL", pictures: Tensor, draw: torch.Generator) -> Tensor:
    decoded = []
    for some in torch.split(pictures, 32):
        with torch.autocast("cpu", torch.bfloat16):
            latents = autoencoder.encode(some).latent_dist.sample(generator=draw)
            decoded.append(autoencoder.decode(latents).sample.float().clamp(-1, 1))
    return torch.cat(decoded)


@torch.no_grad()
def accuracy(judge: Judge, pictures: Tensor, classes: Tensor) -> float:
    """Give the share of pictures (B, 3, 64, 64) whose class (B,) the judge puts first."""
    found = torch.cat([judge(some).argmax(1) for some in torch.split(pictures, 64)])
    return (found == classes).float().mean().item()
