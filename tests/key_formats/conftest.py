"""A tiny SDXL pipeline, and what its own libraries make of random adapters on it."""

import pytest
import torch


def tiny_sdxl(tokenizer, seed=0):
    """A StableDiffusionXLPipeline with SDXL's way of blocks: no attention at the top, two residual blocks each."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text_config(width, act):
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=16,
            hidden_act=act,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=24,
            attention_head_dim=(2, 4),
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        )
        vae = AutoencoderKL(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, sample_size=8)
        text_encoder = CLIPTextModel(text_config(8, "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(text_config(16, "gelu"))
    return StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(),
        add_watermarker=False,
    )


@pytest.fixture(scope="session")
def open_sdxl(tiny_sd_folder):
    """A function that builds the tiny SDXL pipeline, the same each time."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd_folder / "tokenizer")
    return lambda: tiny_sdxl(tokenizer)


@pytest.fixture(scope="session")
def open_sd(tiny_sd_folder):
    """A function that opens the tiny Stable Diffusion pipeline."""
    from diffusers import StableDiffusionPipeline

    return lambda: StableDiffusionPipeline.from_pretrained(tiny_sd_folder)


@pytest.fixture(scope="session")
def predict_sdxl():
    """A function that runs text encoders and UNet of an SDXL pipeline: (2, 4, 8, 8)."""

    @torch.no_grad()
    def predict(pipeline):
        text, _, pooled, _ = pipeline.encode_prompt(["a red cat", "ink"], do_classifier_free_guidance=False)
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        added = {"text_embeds": pooled, "time_ids": torch.arange(12.0).reshape(2, 6)}
        return pipeline.unet(noise, 500, encoder_hidden_states=text, added_cond_kwargs=added).sample

    return predict


@pytest.fixture(scope="session")
def add_peft_lora():
    """A function that adds a random LoRA to a pipeline's components through diffusers and transformers.

    It gives each layer's change of the weight as PEFT computes it, by name on disk, and leaves the adapter attached.
    """
    from peft import LoraConfig

    from mmpeft.injection import disk_name

    unet_targets = (
        r".*(attn\d\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_(in|out)|conv\d?|conv_shortcut|linear_\d)"
    )
    targets = {"unet": unet_targets + "|conv_in|conv_out|.*time_emb_proj", "text": r".*(_proj|fc1|fc2)"}

    def add(pipeline, seed=0, only=("unet", "text_encoder", "text_encoder_2"), **settings):
        generator = torch.Generator().manual_seed(seed)
        changes = {}
        for component in only:
            model = getattr(pipeline, component, None)
            if model is None:
                continue
            pattern = targets["unet" if component == "unet" else "text"]
            model.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": pattern, **settings}))
            for live, module in model.named_modules():
                if not hasattr(module, "lora_A"):
                    continue
                for part in (module.lora_A, module.lora_B, getattr(module, "lora_magnitude_vector", {})):
                    for own in part.values():
                        noise = torch.randn(own.weight.shape, generator=generator)
                        is_magnitude = part is getattr(module, "lora_magnitude_vector", None)
                        own.weight.data = own.weight * (1 + 0.2 * noise) if is_magnitude else 0.3 * noise
                name = f"{component}.{disk_name(component, live, model)}"
                changes[name] = _change(module)
        return changes

    return add


def _change(layer):
    before = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    change = layer.get_base_layer().weight.detach() - before
    layer.unmerge()
    layer.get_base_layer().weight.data = before
    return change
