import pytest
import torch

from mmpeft.backbones.stable_diffusion import StableDiffusion
from mmpeft.config import BaseSettings
from mmpeft.data.tensor_cache import TensorCache
from mmpeft.diffusion.prior import ddim_step, draw_prior, trailing_timesteps


@pytest.fixture(scope="module", params=["v", "epsilon"])
def backbone(request, tiny_sd_folder, tiny_sd_epsilon_folder):
    folder = tiny_sd_folder if request.param == "v" else tiny_sd_epsilon_folder
    return StableDiffusion.open(BaseSettings(name=str(folder), precision="fp32"))


PROMPTS = ["a cat", "a dog", "ink"]


def test_the_finished_drawing_is_what_diffusers_draws(backbone, tmp_path):
    """Against diffusers' DDIM sampler, trailing, from the same noise."""
    from diffusers import DDIMScheduler

    prior = draw_prior(backbone, PROMPTS, TensorCache(tmp_path), seed=3, steps=4, guidance=3.0)
    pipe = backbone.pipeline()
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    drawn = pipe(
        PROMPTS, num_inference_steps=4, guidance_scale=3.0, latents=prior.noisy[:3], output_type="latent"
    ).images
    # Trailing diffusers ends at abar = 1; float32 through four steps.
    torch.testing.assert_close(prior.latents, drawn, rtol=1e-3, atol=1e-3)


def test_each_kept_step_is_what_the_base_says(backbone, tmp_path):
    prior = draw_prior(backbone, PROMPTS, TensorCache(tmp_path), seed=3, steps=4)
    assert len(prior) == 2 * 3 * 4
    assert prior.prompts[:6] == ("a cat", "a dog", "ink", "", "", "")
    for place in (0, 7, 23):
        with torch.no_grad():
            said = backbone.predict(
                prior.noisy[place][None],
                prior.timesteps[place][None],
                backbone.encode_text([prior.prompts[place]]),
            )
        torch.testing.assert_close(said[0], prior.prediction[place], rtol=1e-4, atol=1e-4)


def test_what_was_drawn_before_is_not_drawn_again(backbone, tmp_path):
    first = draw_prior(backbone, PROMPTS, TensorCache(tmp_path), seed=3, steps=2)
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    second = draw_prior(backbone, PROMPTS, TensorCache(tmp_path), seed=3, steps=2)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == stamps
    assert torch.equal(first.prediction, second.prediction)
    draw_prior(backbone, PROMPTS, TensorCache(tmp_path), seed=4, steps=2)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_a_drawing_does_not_depend_on_how_many_processes_share_the_work(backbone, tmp_path):
    prompts = [f"a cat {number}" for number in range(20)]
    alone = draw_prior(backbone, prompts, TensorCache(tmp_path / "one"), seed=0, steps=2)
    shared = draw_prior(
        backbone, prompts, TensorCache(tmp_path / "two"), seed=0, steps=2, process=1, processes=2
    )
    assert torch.equal(alone.prediction, shared.prediction)
    assert alone.prompts == shared.prompts
    assert len(alone.latents) == len(alone.drawn) == 20


def test_timesteps_are_trailing():
    assert trailing_timesteps(1000, 4) == [999, 749, 499, 249]
    assert trailing_timesteps(1000, 1) == [999]


def test_a_step_along_the_true_noise_follows_the_schedule(backbone):
    """x_t made from a picture and noise goes to x_s made from the same picture and noise."""
    schedule = backbone.noise_schedule
    latents, noise = torch.randn(2, *backbone.latent_shape), torch.randn(2, *backbone.latent_shape)
    early, late = torch.full((2,), 700), torch.full((2,), 300)
    noisy = schedule.add_noise(latents, noise, early)
    stepped = ddim_step(schedule, schedule.target(latents, noise, early), noisy, 700, 300)
    torch.testing.assert_close(stepped, schedule.add_noise(latents, noise, late), rtol=1e-4, atol=1e-4)
