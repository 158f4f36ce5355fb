import pytest
import torch

from mmpeft.diffusion.noise_schedule import NoiseSchedule
from mmpeft.errors import BaseError

CONFIGS = {
    "sd1": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "linear": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.001 * (i + 1) for i in range(50)], "num_train_timesteps": 50},
    "zero_snr": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
}


def pair(name):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**CONFIGS[name])
    return NoiseSchedule.from_config(scheduler.config), scheduler


def sample(schedule, count=5):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, count, 4, 3, 3, generator=generator)
    return latents, noise, torch.linspace(0, schedule.timesteps - 1, count).long()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_schedule_equals_diffusers(name):
    schedule, scheduler = pair(name)
    # atol: diffusers multiplies a thousand float32 factors, we do so in float64
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_noise_and_v_equal_diffusers(name):
    schedule, scheduler = pair(name)
    latents, noise, timesteps = sample(schedule)
    noisy = schedule.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps), rtol=1e-4, atol=1e-4)
    expected = noise
    if schedule.prediction == "v":
        expected = scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_true_target_gives_the_clean_latents_back(name):
    schedule, _ = pair(name)
    latents, noise, timesteps = sample(schedule)
    noisy = schedule.add_noise(latents, noise, timesteps)
    clean = schedule.x0_of(schedule.target(latents, noise, timesteps), noisy, timesteps)
    # atol: float32 rounding is divided by the signal, 0.005 at the noisiest timestep of the cosine schedule
    torch.testing.assert_close(clean, latents, rtol=1e-3, atol=2e-3)


def test_zero_terminal_snr_is_exactly_zero_and_keeps_the_first_value():
    rescaled, plain = pair("zero_snr")[0], pair("sd1")[0]
    last = torch.tensor([999])
    assert rescaled.snr(last).item() == 0
    assert plain.snr(last).item() > 0
    assert rescaled.alphas_cumprod[0] == plain.alphas_cumprod[0]
    latents, noise, _ = sample(rescaled, 1)
    assert torch.equal(rescaled.add_noise(latents, noise, last), noise)
    assert torch.equal(rescaled.target(latents, noise, last), -latents)


def test_snr_is_the_ratio_of_powers():
    schedule, _ = pair("sd1")
    timesteps = torch.tensor([0, 500, 999])
    signal = schedule.add_noise(torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1), timesteps).flatten()
    noise = schedule.add_noise(torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1), timesteps).flatten()
    # rtol: 1 - abar is small at timestep 0
    torch.testing.assert_close(schedule.snr(timesteps), (signal / noise) ** 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"prediction_type": "sample"}, "the base predicts 'sample'"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid' is not known; known are 'linear'"),
    ],
)
def test_what_cannot_be_trained_is_said(config, text):
    with pytest.raises(BaseError, match=text):
        NoiseSchedule.from_config(config)
