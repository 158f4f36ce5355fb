"""The last acts of a run: the saved adapter is proved in stock diffusers, and gets its preview picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from mmpeft.adapter import load_adapter
from mmpeft.backbones.base import ImageBackbone
from mmpeft.backbones.stable_diffusion_files import quietly
from mmpeft.config import PreviewSettings
from mmpeft.verification import VerificationReport, predict, verify

PREVIEW = "preview.png"


def finish(
    backbone: ImageBackbone, folder: Path, *, captions: Sequence[str], preview: PreviewSettings
) -> VerificationReport:
    """Compare the saved adapter, loaded in stock diffusers, with the trained model, and draw its preview there.

    The preview is drawn by the stock pipeline in float32, so that anybody who follows the card gets the same picture.

    Args:
        backbone: with the trained parameters in place, as they were saved.
        folder: the saved adapter.
        captions: some that it was trained on, with the trigger.
        preview: its first prompt is the one on the card; without prompts there is no preview.
    """
    with backbone.exactly():
        trained = predict(backbone.pipeline(), captions)
    # Only now, so that a large base is never held twice in float32.
    plain = backbone.plain_pipeline()
    with quietly():
        report = verify(folder, plain, lambda prompts, seed: trained, prompts=captions)
    if report.is_ok and preview.prompts:
        plain.load_lora_weights(str(folder))
        card, picture = _draw_preview(plain, preview)
        adapter = load_adapter(folder)
        adapter.card = replace(adapter.card, preview=card)
        adapter.save(folder, {PREVIEW: picture})
    return report


@torch.no_grad()
def _draw_preview(pipeline: Any, preview: PreviewSettings) -> tuple[dict[str, Any], bytes]:
    wanted = preview.prompts[0]
    picture = pipeline(
        wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        num_inference_steps=preview.steps,
        guidance_scale=preview.guidance,
        width=wanted.width,
        height=wanted.height,
        generator=torch.Generator().manual_seed(wanted.seed),
    ).images[0]
    stream = BytesIO()
    picture.save(stream, format="PNG")
    said = {
        "file": PREVIEW,
        "prompt": wanted.prompt,
        "negative_prompt": wanted.negative_prompt,
        "seed": wanted.seed,
        "width": picture.width,
        "height": picture.height,
        "steps": preview.steps,
        "guidance": preview.guidance,
        "sampler": type(pipeline.scheduler).__name__,
    }
    return said, stream.getvalue()
