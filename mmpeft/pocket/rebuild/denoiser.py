"""Train the pocket base's denoiser and text encoder, together, on the taught concepts in one style."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpeft.pocket.rebuild.autoencoder import SCALING, encode
from mmpeft.pocket.rebuild.captions import caption
from mmpeft.pocket.rebuild.clip import Example
from mmpeft.pocket.rebuild.colours import BACKGROUNDS, PAINTS, is_kept_unseen, paint
from mmpeft.pocket.rebuild.concepts import Concept
from mmpeft.pocket.rebuild.drawings import Pixels, put_on
from mmpeft.pocket.rebuild.training import MuonForKernels, averaged, fit
from mmpeft.randomness import generator, reseed_globals, seed_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

KINDS = {"plain": 0.74, "painted": 0.18, "background": 0.08}
"""kind of picture -> its share of the samples"""
NOISY_SHARE = 0.65
"""share of the timesteps that is drawn from the noisier half, where shapes are decided"""
WITHOUT_CAPTION = 0.1
"""share of the samples that guidance's empty prompt is learned from"""
EVERY = 4
"""steps between two updates of the average"""


@dataclass(frozen=True)
class Spec:
    """What a training picture shows, for its captions."""

    concept: Concept
    painted: str | None = None
    background: str | None = None
    own: str | None = None

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return "painted" if self.painted else "background" if self.background else "plain"


class Denoiser(nn.Module):
    """The UNet with the text encoder before it, trained as one."""

    def __init__(self, unet: "UNet2DConditionModel", text_encoder: "CLIPTextModel") -> None:
        super().__init__()
        self.unet: Any = unet
        self.text_encoder: Any = text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Predict v.

        Args:
            latents: noisy, (B, 4, 16, 16).
            timesteps: (B,), int, 0..999.
            tokens: (B, T), int.

        Returns:
            (B, 4, 16, 16).
        """
        hidden = self.text_encoder(tokens)[0]
        predicted: Tensor = self.unet(latents, timesteps, hidden, return_dict=False)[0]
        return predicted


def build_unet() -> "UNet2DConditionModel":
    """Build the network with fresh weights; pooled text joins the time embedding."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=192,
        attention_head_dim=(1, 4, 4),
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_noise_schedule() -> "DDIMScheduler":
    """Build the schedule: Stable Diffusion's betas, rescaled so that the last timestep is pure noise.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891; with it
    the model predicts v and sampling starts at the last timestep.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def loss_weights(alphas_cumprod: Tensor) -> Tensor:
    """Weigh the v loss of each timestep by min(snr + 1, 6) / (snr + 1), at least 0.05, with mean 1.

    Min-SNR (Hang et al. 2023, arXiv:2303.09556) with 5, but whole at high noise, where min(snr, 5) / (snr + 1)
    goes to zero and shapes are never learned.

    Args:
        alphas_cumprod: (T,), in [0, 1).

    Returns:
        (T,).
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = ((snr + 1).clamp(max=6) / (snr + 1)).clamp(min=0.05)
    return weights / weights.mean()


def draw_timesteps(count: int, draw: torch.Generator) -> Tensor:
    """Draw timesteps (count,), int64, 0..999: stratified over the batch, 65 % of them at or above 500."""
    place = (torch.arange(count) + torch.rand(count, generator=draw)) / count
    clear = 1 - NOISY_SHARE
    timesteps = torch.where(place < clear, place / clear * 500, 500 + (place - clear) / NOISY_SHARE * 500)
    return timesteps.long().clamp(0, 999)


def training_pictures(examples: Sequence[Example], choose: np.random.Generator) -> list[tuple[Pixels, Spec]]:
    """Draw each concept plainly, in every colour that is not kept unseen, and on four backgrounds.

    Returns:
        RGB pictures (64, 64, 3) with what they show.
    """
    pictures = []
    for example in examples:
        concept, drawing = example.concept, example.drawing
        pictures.append((put_on(drawing), Spec(concept, own=example.own)))
        for colour in PAINTS:
            if example.hue is None or colour == example.own or is_kept_unseen(concept.name, colour):
                continue
            pictures.append((put_on(paint(drawing, example.hue, colour)), Spec(concept, painted=colour)))
        for colour in choose.permutation(list(BACKGROUNDS))[:4].tolist():
            spec = Spec(concept, background=colour, own=example.own)
            pictures.append((put_on(drawing, BACKGROUNDS[colour]), spec))
    return pictures


def train_denoiser(
    examples: Sequence[Example],
    autoencoder: "AutoencoderKL",
    tokenizer: "CLIPTokenizer",
    text_encoder: "CLIPTextModel",
    *,
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float = 8e-4,
    is_compiled: bool = False,
) -> Denoiser:
    """Train on the examples' latents; in float32, averaged.

    Muon takes the UNet's matrices and kernels, AdamW what is left and, at 0.3 of the learning rate, the text
    encoder. The learning rate holds for half of the steps and then falls along half a cosine.

    Args:
        text_encoder: CLIP's, with eager attention; it is trained in place.
        is_compiled: compile the UNet with torch.compile, which needs a C++ compiler.
    """
    from diffusers.models.attention_processor import AttnProcessor

    reseed_globals(seed, "denoiser")
    draw, choose = generator(seed, "denoiser"), np.random.default_rng(seed_of(seed, "denoiser"))
    unet = build_unet().to(memory_format=torch.channels_last)  # MuonForKernels needs it
    denoiser = Denoiser(unet, text_encoder).train()
    # At this size SDPA's backward is slower than plain matrix products'.
    denoiser.unet.set_attn_processor(AttnProcessor())
    average = averaged(denoiser, limit=0.997)
    learner = Denoiser(torch.compile(denoiser.unet), text_encoder) if is_compiled else denoiser

    pictures = training_pictures(examples, choose)
    means, deviations = encode(autoencoder, np.stack([picture for picture, _ in pictures]))
    specs = [spec for _, spec in pictures]
    pools = [np.array([i for i, spec in enumerate(specs) if spec.kind == kind]) for kind in KINDS]
    shares = np.array(list(KINDS.values())) * [len(pool) > 0 for pool in pools]
    alphas = build_noise_schedule().alphas_cumprod
    weights = loss_weights(alphas)

    def batch_loss(progress: float) -> Tensor:
        kinds = choose.choice(len(pools), batch, p=shares / shares.sum())
        indices = [int(choose.choice(pools[kind])) for kind in kinds]
        noise = [torch.randn(batch, 4, 16, 16, generator=draw) for _ in range(2)]
        latents = SCALING * (means[indices] + noise[0] * deviations[indices])
        timesteps = draw_timesteps(batch, draw)
        signal = alphas[timesteps].sqrt()[:, None, None, None]
        spread = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        noisy = signal * latents + spread * noise[1]
        target = signal * noise[1] - spread * latents
        tokens = _tokens(tokenizer, [_caption(specs[index], choose) for index in indices])
        with torch.autocast("cpu", torch.bfloat16):
            predicted: Tensor = learner(
                noisy.contiguous(memory_format=torch.channels_last), timesteps, tokens
            )
        errors = (predicted.float() - target).pow(2).mean((1, 2, 3))
        loss: Tensor = (errors * weights[timesteps]).mean()
        return loss

    def after_step(done: int) -> None:
        if done % EVERY == 0 or done == steps:
            average.update_parameters(denoiser)

    optimizers = build_optimizers(denoiser, learning_rate)
    fit(
        batch_loss,
        denoiser,
        optimizers,
        name="denoiser",
        steps=steps,
        warmup=150,
        hold=0.5,
        after_step=after_step,
    )
    trained = average.module.eval()
    assert isinstance(trained, Denoiser)
    return trained


def build_optimizers(denoiser: Denoiser, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Give Muon the matrices and kernels inside the UNet, AdamW its ends, norms and biases and the text encoder."""
    ends = ("conv_in", "conv_out", "time_embedding", "norm", "positional")
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in denoiser.unet.named_parameters():
        is_inner = parameter.ndim >= 2 and not any(end in name for end in ends)
        (inner if is_inner else rest).append(parameter)
    text = list(denoiser.text_encoder.parameters())
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": text, "lr": 0.3 * learning_rate}]
    adam = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    return [adam, MuonForKernels(inner, learning_rate, weight_decay=1e-3)]


def _caption(spec: Spec, choose: np.random.Generator) -> str:
    if choose.random() < WITHOUT_CAPTION:
        return ""
    return caption(spec.concept, choose, painted=spec.painted, background=spec.background, own=spec.own)


def _tokens(tokenizer: "CLIPTokenizer", texts: list[str]) -> Tensor:
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    tokens: Tensor = encoded.input_ids
    return tokens
