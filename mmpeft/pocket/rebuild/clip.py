"""Train the pocket base's CLIP, whose text tower the denoiser's text encoder starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.pocket.rebuild.augmentation import between, chance, warp
from mmpeft.pocket.rebuild.captions import caption
from mmpeft.pocket.rebuild.colours import (
    BACKGROUNDS,
    PAINTS,
    is_kept_unseen,
    own_colour,
    paint,
    paintable_hue,
)
from mmpeft.pocket.rebuild.concepts import Concept
from mmpeft.pocket.rebuild.drawings import WHITE, Drawings, Pixels, put_on, to_tensor
from mmpeft.pocket.rebuild.tokenizer import MAX_LENGTH
from mmpeft.pocket.rebuild.training import averaged, fit
from mmpeft.randomness import generator, reseed_globals, seed_of

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


@dataclass(frozen=True)
class Example:
    """One drawing and what may be said and done about its colour."""

    drawing: Pixels
    """(64, 64, 4), RGBA"""
    concept: Concept
    hue: float | None
    """the hue that painting replaces, degrees; None if it must not be painted"""
    own: str | None
    """the colour word of the drawing as it is"""


def build_clip(tokenizer: "CLIPTokenizer") -> "CLIPModel":
    """Build the network with fresh weights: text 3 layers x 192, image ViT 4 layers x 160 on 8-pixel patches."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        hidden_act="quick_gelu",
    )
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=128,
        hidden_act="quick_gelu",
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    )


def examples_of(drawings: Sequence[Drawings], concepts: Mapping[str, Concept]) -> list[Example]:
    """Look at each drawing's colours once."""
    examples = []
    for style in drawings:
        for drawing, name in zip(style.pixels, style.names, strict=True):
            concept = concepts[name]
            hue = None if concept.is_person else paintable_hue(drawing)
            examples.append(Example(drawing, concept, hue, own_colour(drawing)))
    return examples


def train_clip(
    examples: Sequence[Example],
    tokenizer: "CLIPTokenizer",
    *,
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float = 1.2e-3,
) -> "CLIPModel":
    """Train with the symmetric contrastive loss of Radford et al. 2021, arXiv:2103.00020; in float32, averaged.

    Each batch shows each concept at most once; taught and familiar ones are drawn seven times as often as others.
    """
    reseed_globals(seed, "clip")
    draw, choose = generator(seed, "clip"), np.random.default_rng(seed_of(seed, "clip"))
    model = build_clip(tokenizer)
    average = averaged(model, limit=0.995)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    by_concept: dict[str, list[Example]] = {}
    for example in examples:
        by_concept.setdefault(example.concept.name, []).append(example)
    pools = list(by_concept.values())
    weights = np.array([0.15 if pool[0].concept.tier == "named" else 1.0 for pool in pools])
    batch = min(batch, len(pools))

    def batch_loss(progress: float) -> Tensor:
        chosen = choose.choice(len(pools), batch, replace=False, p=weights / weights.sum())
        shown = [show(pools[index][choose.integers(len(pools[index]))], choose) for index in chosen]
        pictures = warp(to_tensor(picture for picture, _ in shown), draw, shrink=(0.85, 1.2), shift=0.12)
        if chance(draw) < 0.3:
            gain, offset = between(0.8, 1.15, (1,), draw), between(-0.1, 0.1, (1,), draw)
            pictures = (pictures * gain + offset).clamp(-1, 1)
        texts = tokenizer([text for _, text in shown], padding=True, truncation=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            seen = model(input_ids=texts.input_ids, pixel_values=pictures)
        scale = model.logit_scale.exp().clamp(max=60)
        logits = scale * seen.image_embeds.float() @ seen.text_embeds.float().T
        right = torch.arange(batch)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

    fit(
        batch_loss,
        model,
        [optimizer],
        name="clip",
        steps=steps,
        warmup=80,
        floor=0.03,
        after_step=lambda _: average.update_parameters(model),
    )
    trained: CLIPModel = average.module.eval()
    return trained


def show(example: Example, choose: np.random.Generator) -> tuple[Pixels, str]:
    """Paint, turn and caption a drawing at random: an RGB picture (64, 64, 3) and its caption."""
    drawing, painted, background = example.drawing, None, None
    if example.hue is not None and choose.random() < 0.35:
        colour = str(choose.choice(PAINTS))
        if not is_kept_unseen(example.concept.name, colour):
            drawing, painted = paint(drawing, example.hue, colour), colour
    if choose.random() < 0.2:
        background = str(choose.choice(list(BACKGROUNDS)))
    picture = put_on(drawing, BACKGROUNDS[background] if background else WHITE)
    own = None if painted else example.own
    if choose.random() < 0.5 and not {"left", "right"} & set(example.concept.name.split()):
        picture = picture[:, ::-1]
    if not background and not painted and choose.random() < 0.12:
        picture, own = np.repeat(picture.mean(-1, keepdims=True).astype(np.uint8), 3, -1), None
    return picture, caption(example.concept, choose, painted=painted, background=background, own=own)
