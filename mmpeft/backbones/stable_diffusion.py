"""Stable Diffusion 1.x, 2.x and the pocket base: a classic UNet, a VAE and one CLIP text encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn

from mmpeft.attention import set_attention
from mmpeft.backbones.base import ImageBackbone
from mmpeft.backbones.fingerprint import Fingerprint
from mmpeft.backbones.stable_diffusion_files import load_pipeline, plain_title
from mmpeft.config import BaseSettings
from mmpeft.diffusion.noise_schedule import NoiseSchedule
from mmpeft.disk.safetensors_file import stored_bytes
from mmpeft.errors import BaseError, ConfigError
from mmpeft.injection import live_layers
from mmpeft.plugins import near_miss

_ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
)
# proj_in and proj_out lead into and out of the transformer blocks that hold the feed-forward layers.
_MLP = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "mlp.fc1", "mlp.fc2")
_CONV = ("conv1", "conv2", "conv_shortcut", "downsamplers.*.conv", "upsamplers.*.conv")

# Above this many parameters the denoiser and the text encoder are rounded to the compute type and their matrices stored
# in it, which halves their memory; autocast would compute with the same. Below it float32 is kept: exact, and as fast.
_STORE_HALF_ABOVE = 250_000_000
# Pixels, and pictures, that are drawn at once.
_PIXELS_AT_ONCE = 2 * 512 * 512
_PICTURES_AT_ONCE = 32


class StableDiffusion(ImageBackbone):
    """A frozen Stable Diffusion; `open` makes one."""

    main_component = "unet"
    target_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": _ATTENTION,
        "mlp": _MLP,
        "conv": _CONV,
        "time": ("time_emb_proj",),
        "all": (*_ATTENTION, *_MLP, *_CONV),
    }

    def __init__(self, pipeline: Any, settings: BaseSettings) -> None:
        """Freeze a StableDiffusionPipeline and set it up as the settings say.

        Raises:
            ConfigError: the precision, attention or clip skip that is asked for cannot be had.
        """
        self._settings = settings
        self._scheduler = pipeline.scheduler
        self._tokenizer = pipeline.tokenizer
        self._unet, self._vae, self._text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
        self.components = {"unet": self._unet, "text_encoder": self._text_encoder}
        self.device = _device()
        self.compute_dtype = choose_dtype(settings.precision, self.device)
        self.noise_schedule = NoiseSchedule.from_config(self._scheduler.config)
        self._vae_factor = vae_factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        self.size_multiple = vae_factor * 2 ** (len(self._unet.config.block_out_channels) - 1)
        self.resolution = int(self._unet.config.sample_size) * vae_factor
        side = int(self._unet.config.sample_size)
        self.latent_shape = (int(self._unet.config.in_channels), side, side)
        positions = self._text_encoder.config.max_position_embeddings
        self._text_length = min(self._tokenizer.model_max_length, positions)
        self.token_limit = self._text_length - 2
        if settings.clip_skip >= self._text_encoder.config.num_hidden_layers:
            raise ConfigError(
                f"base.clip_skip: the text encoder has {self._text_encoder.config.num_hidden_layers} layers, "
                f"at least one must stay; got {settings.clip_skip}"
            )
        models = {**self.components, "vae": self._vae}
        self.parameter_count = sum(p.numel() for model in models.values() for p in model.parameters())
        store_half = self.compute_dtype != torch.float32 and self._unet.num_parameters() > _STORE_HALF_ABOVE
        self._stored_half = _matrices(self._unet, self._text_encoder) if store_half else []
        _cast(self._stored_half, self.compute_dtype)
        stored = {id(parameter) for parameter in self._stored_half}
        _cast([p for m in models.values() for p in m.parameters() if id(p) not in stored], torch.float32)
        layout = torch.channels_last if settings.channels_last else torch.preserve_format
        for model in models.values():
            model.requires_grad_(False).eval().to(self.device)
        for model in (self._unet, self._vae):
            model.to(memory_format=layout)
        self.attention = set_attention(
            models, settings.attention, device=self.device, dtype=self.compute_dtype
        )
        if settings.gradient_checkpointing:
            self._unet.enable_gradient_checkpointing()
            # transformers renamed it within 5.x. Reentrant checkpointing would ask for inputs with gradients, which
            # token embeddings are not.
            encoder = self._text_encoder
            enable = getattr(
                encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        # A handle beside the module, so that layer names stay and pictures of other sizes do not recompile.
        self._compiled = torch.compile(self._unet) if settings.compile else self._unet
        self._exact = False
        # Kept by name before adapters rename layers.
        self._vae_weights = dict(self._vae.named_parameters())
        self._text_weights = dict(self._text_encoder.named_parameters())
        self._unet_weights = dict(self._unet.named_parameters())

    @classmethod
    def open(cls, settings: BaseSettings) -> Self:
        """Load a base: "pocket", a diffusers folder, a single .safetensors file or a hub name.

        Raises:
            BaseError: it cannot be found, reached or read, or is no Stable Diffusion 1.x or 2.x.
            ConfigError: the precision, attention or clip skip that is asked for cannot be had.
        """
        dtype = choose_dtype(settings.precision, _device())
        half = dtype if dtype != torch.float32 else None
        return cls(load_pipeline(settings.name, settings.config, half), settings)

    @property
    def title(self) -> str:
        """The hub name, or the plain name of the folder or file."""
        return plain_title(self._settings.name)

    @cached_property
    def vae_fingerprint(self) -> str:  # type: ignore[override]
        """Digest of the VAE's weights and scaling."""
        scaling = {key: self._vae.config.get(key) for key in ("scaling_factor", "shift_factor")}
        return _digest(self._vae_weights, json.dumps(scaling, sort_keys=True))

    @cached_property
    def text_fingerprint(self) -> str:  # type: ignore[override]
        """Digest of the text encoder's weights, the tokenizer, and the type that is computed in."""
        tokenizer = json.loads(self._tokenizer.backend_tokenizer.to_str())
        # Set by each call, not by the model.
        del tokenizer["padding"], tokenizer["truncation"]
        settings = [tokenizer, self._text_length, str(self._tokenizer.pad_token), str(self.compute_dtype)]
        return _digest(self._text_weights, json.dumps(settings, sort_keys=True))

    @cached_property
    def denoiser_fingerprint(self) -> str:  # type: ignore[override]
        """Digest of the UNet's own weights, its prediction, and the type that is computed in."""
        return _digest(self._unet_weights, f"{self.noise_schedule.prediction} {self.compute_dtype}")

    def fingerprint(self, layers: Sequence[str]) -> Fingerprint:
        """Sketch the base's own weights of some layers; see the contract."""
        live: dict[str, Any] = {
            f"{component}.{disk}": model.get_submodule(name).weight
            for component, model in self.components.items()
            for disk, name in live_layers(component, model).items()
        }
        for layer in layers:
            if layer not in live:
                raise BaseError(f"{self.title} has no layer {layer!r}{near_miss(layer, list(live))[:300]}")
        return Fingerprint.of({layer: live[layer] for layer in layers}, self.noise_schedule.prediction)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures into the VAE's posterior, in float32; see the contract."""
        with torch.autocast(self.device.type, enabled=False):
            posterior = self._vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        scale = self._vae.config.scaling_factor
        mean = (posterior.mean - (self._vae.config.shift_factor or 0.0)) * scale
        # contiguous: channels-last latents would make cached bytes depend on a speed setting
        log_variance = posterior.logvar + 2 * torch.tensor(scale).log()
        return mean.contiguous(), log_variance.contiguous()

    @torch.no_grad()
    def decode_image(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents into pictures; see the contract."""
        at_once = max(1, _PICTURES_AT_ONCE * 64 * 64 // (latents[0, 0].numel() * self._vae_factor**2))
        processor, pictures = self._wrapped().image_processor, []
        for part in latents.to(self.device).split(at_once):
            pictures += processor.postprocess(self._decode(part), output_type="pil")
        return pictures

    def token_count(self, caption: str) -> int:
        """Count the tokens of a caption, without marks, padding or truncation."""
        return len(self._tokenizer(caption, add_special_tokens=False, verbose=False).input_ids)

    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode captions, cut to `token_limit` tokens.

        With clip skip n, the states n layers before the last go through the final norm.

        Returns:
            {"text": (B, T, D)}, float32; gradients flow if the text encoder learns.
        """
        tokens = self._tokenizer(
            list(captions),
            padding="max_length",
            max_length=self._text_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)
        skip = self._settings.clip_skip
        with self._autocast():
            output = self._text_encoder(tokens, output_hidden_states=skip > 0)
            states = output.last_hidden_state
            if skip:
                inner = getattr(self._text_encoder, "text_model", self._text_encoder)
                states = inner.final_layer_norm(output.hidden_states[-1 - skip])
        return {"text": states.float()}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Run the UNet; see the contract."""
        if self._settings.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        unet = self._compiled if torch.is_grad_enabled() else self._unet
        with self._autocast():
            output = unet(noisy, timesteps, conditioning["text"].to(self.device), return_dict=False)[0]
        return output.float()  # type: ignore[no-any-return]

    def pipeline(self) -> Any:
        """Give a StableDiffusionPipeline around the live modules, in evaluation mode.

        Of a base above 250 million parameters in half precision, the weights are of mixed types: call the pipeline
        within `exactly`, or under autocast.
        """
        for model in (self._unet, self._vae, self._text_encoder):
            model.eval()
        return self._wrapped()

    def generate(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        width: int | None = None,
        height: int | None = None,
    ) -> list[Image.Image]:
        """Draw a picture for each prompt from its own seed, with the base's own sampler; see the contract.

        The seeds mean what they mean in stock diffusers: one CPU generator for each picture. Within `exactly`, the
        pictures are those of the stock pipeline.

        Raises:
            ConfigError: counts that differ, or sides that are no multiple of `size_multiple`.
        """
        width, height = width or self.resolution, height or self.resolution
        if width % self.size_multiple or height % self.size_multiple:
            raise ConfigError(
                f"width and height must be multiples of {self.size_multiple} for {self.title}; "
                f"got {width} x {height}"
            )
        negative_prompts = negative_prompts or [""] * len(prompts)
        if not len(prompts) == len(negative_prompts) == len(seeds):
            raise ConfigError(
                f"each prompt needs one seed and one negative prompt; got {len(prompts)} prompts, "
                f"{len(negative_prompts)} negative prompts and {len(seeds)} seeds"
            )
        at_once = max(1, min(_PICTURES_AT_ONCE, _PIXELS_AT_ONCE // (width * height)))
        pictures: list[Image.Image] = []
        with self._evaluating(), torch.no_grad():
            pipeline = self._wrapped()
            for start in range(0, len(prompts), at_once):
                part = slice(start, start + at_once)
                with self._autocast():
                    latents = pipeline(
                        prompt_embeds=self.encode_text(prompts[part])["text"],
                        negative_prompt_embeds=self.encode_text(negative_prompts[part])["text"],
                        generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        width=width,
                        height=height,
                        output_type="latent",
                    ).images
                pictures += pipeline.image_processor.postprocess(self._decode(latents), output_type="pil")
        return pictures

    def plain_pipeline(self) -> Any:
        """Load the base anew as a stock StableDiffusionPipeline in float32, silent and in evaluation mode.

        Where this backbone stores matrices in half precision, the weights are rounded alike, so that a difference
        is an adapter's.
        """
        pipeline = load_pipeline(self._settings.name, self._settings.config)
        if self._stored_half:
            _round(pipeline.unet, pipeline.text_encoder, dtype=self.compute_dtype, stored=())
        pipeline.to(self.device)
        return pipeline

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Compute in float32 within a with block, to compare with `plain_pipeline`."""
        before, self._exact = self._exact, True
        if not before:
            _cast(self._stored_half, torch.float32)
        try:
            yield
        finally:
            self._exact = before
            if not before:
                _cast(self._stored_half, self.compute_dtype)

    def _autocast(self) -> torch.autocast:
        enabled = self.compute_dtype != torch.float32 and not self._exact
        return torch.autocast(
            self.device.type, self.compute_dtype if enabled else torch.bfloat16, enabled=enabled
        )

    def _decode(self, latents: Tensor) -> Tensor:
        # Never float16: its range is too small for some VAEs, which then give black pictures.
        half = self.compute_dtype == torch.bfloat16 and not self._exact
        latents = latents.float() / self._vae.config.scaling_factor + (self._vae.config.shift_factor or 0.0)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            pixels: Tensor = self._vae.decode(latents, return_dict=False)[0]
        return pixels.float()

    def _wrapped(self) -> Any:
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=self._vae,
            text_encoder=self._text_encoder,
            tokenizer=self._tokenizer,
            unet=self._unet,
            scheduler=type(self._scheduler).from_config(self._scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        models = (self._unet, self._vae, self._text_encoder)
        modes = [(module, module.training) for model in models for module in model.modules()]
        # Guidance and the sampler add up in float32, though the UNet's last layer gives half precision.
        hook = self._unet.register_forward_hook(lambda module, inputs, output: (output[0].float(),))
        for model in models:
            model.eval()
        try:
            yield
        finally:
            hook.remove()
            for module, training in modes:
                module.training = training


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Choose what to compute in; auto is the fastest type that this device computes natively and that is safe.

    Returns:
        For auto: on CUDA bfloat16, or float16 on cards without it; on a CPU with AMX or AVX512-bf16 bfloat16; else
        float32.
    """
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        return named[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    # Private names that move between versions of torch; where they are gone, float32 is slow but right.
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return any(check is not None and bool(check()) for check in checks)


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def _matrices(*models: nn.Module) -> list[nn.Parameter]:
    """List the parameters of linear and convolution layers: what autocast computes in half precision."""
    layers = (m for model in models for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False)]


def _round(*models: nn.Module, dtype: torch.dtype, stored: Sequence[nn.Parameter]) -> None:
    """Round parameters to a type; those that are not stored in it become float32 again, for norms need it."""
    kept = {id(parameter) for parameter in stored}
    for parameter in (parameter for model in models for parameter in model.parameters()):
        rounded = parameter.data.to(dtype)
        parameter.data = rounded if id(parameter) in kept else rounded.float()


def _cast(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _digest(weights: Mapping[str, Tensor], settings: str) -> str:
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(stored_bytes(tensor))
    return digest.hexdigest()
