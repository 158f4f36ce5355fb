from dataclasses import replace

import pytest
import torch

from mmpeft.backbones.stable_diffusion import StableDiffusion
from mmpeft.config import BaseSettings
from mmpeft.diffusion.denoise import Denoise, DenoiseSettings, ImageBatch, PriorBatch, PriorSettings
from mmpeft.errors import ConfigError


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return StableDiffusion.open(BaseSettings(name=str(tiny_sd_folder), precision="fp32"))


@pytest.fixture(scope="module")
def batch(backbone):
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 4, 4, 8, 8, generator=generator)
    with torch.no_grad():
        conditioning = backbone.encode_text(["a cat", "a red dog", "ink", ""])
    return ImageBatch(mean, log_variance - 3, conditioning, (0, 1, 2, 3), 4)


def part(batch, *positions):
    index = list(positions)
    conditioning = {name: tensor[index] for name, tensor in batch.conditioning.items()}
    return ImageBatch(batch.mean[index], batch.log_variance[index], conditioning, positions, batch.step_size)


class Recorder(StableDiffusion):
    """The real backbone, which also keeps what it was asked."""

    def predict(self, noisy, timesteps, conditioning):
        self.asked.append((noisy, timesteps))
        return super().predict(noisy, timesteps, conditioning)


def asked(folder, objective, batches):
    backbone = Recorder.open(BaseSettings(name=str(folder), precision="fp32"))
    backbone.asked = []
    total = sum(objective.loss(backbone, batch, seed=7, step=3)[0].item() for batch in batches)
    noisy, timesteps = zip(*backbone.asked, strict=True)
    return torch.cat(noisy), torch.cat(timesteps), total


@pytest.mark.parametrize("splits", [[(0, 1), (2, 3)], [(0, 1, 2), (3,)], [(0, 2), (1, 3)]])
def test_splitting_a_step_changes_no_draw(tiny_sd_folder, batch, splits):
    objective = Denoise(DenoiseSettings(noise_offset=0.1))
    noisy, timesteps, total = asked(tiny_sd_folder, objective, [batch])
    parts = asked(tiny_sd_folder, objective, [part(batch, *positions) for positions in splits])
    order = [position for positions in splits for position in positions]
    assert torch.equal(parts[0], noisy[order])
    assert torch.equal(parts[1], timesteps[order])
    assert parts[2] == pytest.approx(total, rel=1e-5)  # float32 kernels may differ with the batch's size


def test_seed_and_step_change_every_draw(backbone, batch):
    objective = Denoise(DenoiseSettings())
    losses = {objective.loss(backbone, batch, seed=s, step=n)[0].item() for s in (0, 1) for n in (0, 1)}
    assert len(losses) == 4
    again = objective.loss(backbone, batch, seed=0, step=0)
    assert again[0].item() in losses
    assert again[1] == 4


def test_timesteps_of_a_step_are_stratified():
    objective = Denoise(DenoiseSettings())
    for step in range(5):
        drawn = objective.draw_timesteps(range(10), 10, seed=0, step=step).sort().values
        assert torch.equal(drawn // 100, torch.arange(10))


def test_timesteps_stay_in_their_range_and_lean_to_noise():
    objective = Denoise(DenoiseSettings(timesteps=(200, 599), noisy_share=0.75))
    drawn = torch.cat([objective.draw_timesteps(range(8), 8, seed=0, step=step) for step in range(100)])
    assert drawn.min() >= 200
    assert drawn.max() <= 599
    assert drawn.unique().numel() > 300
    assert (drawn >= 400).float().mean().item() == pytest.approx(0.75, abs=1e-6)  # stratified: exactly 6 of 8


def test_one_timestep_can_be_taught_alone():
    objective = Denoise(DenoiseSettings(timesteps=(999, 999)))
    assert objective.draw_timesteps(range(4), 4, seed=0, step=0).tolist() == [999] * 4


def test_loss_of_a_perfect_prediction_is_zero(backbone, batch):
    objective = Denoise(DenoiseSettings())
    noise, timesteps = torch.ones_like(batch.mean), torch.tensor([1, 300, 600, 999])
    noisy = backbone.noise_schedule.add_noise(batch.mean, noise, timesteps)
    with torch.no_grad():
        target = backbone.predict(noisy, timesteps, batch.conditioning)
        losses = objective.losses_at(backbone, noisy, timesteps, target, batch.conditioning)
        other = objective.losses_at(backbone, noisy, timesteps, target + 2, batch.conditioning)
    assert torch.equal(losses, torch.zeros(4))
    torch.testing.assert_close(other, torch.full((4,), 4.0))


@pytest.mark.parametrize("weighting", ["min_snr", "snr_plus_one", "debiased"])
def test_weighting_multiplies_each_samples_loss(backbone, batch, weighting):
    noise, timesteps = torch.ones_like(batch.mean), torch.tensor([1, 300, 600, 999])
    noisy = backbone.noise_schedule.add_noise(batch.mean, noise, timesteps)
    arguments = (backbone, noisy, timesteps, noise, batch.conditioning)
    with torch.no_grad():
        plain = Denoise(DenoiseSettings()).losses_at(*arguments)
        weighted = Denoise(DenoiseSettings(weighting=weighting, gamma=4)).losses_at(*arguments)
    snr = backbone.noise_schedule.snr(timesteps)
    factor = {
        "min_snr": snr.clamp(max=4) / (snr + 1),
        "snr_plus_one": (snr + 1).clamp(max=4) / (snr + 1),
        "debiased": snr / (snr + 1) / snr.clamp(min=1e-30, max=1000).sqrt(),
    }[weighting]
    torch.testing.assert_close(weighted, plain * factor)


def test_huber_is_chosen_by_name(backbone, batch):
    square = Denoise(DenoiseSettings()).loss(backbone, batch, seed=0, step=0)[0]
    huber = Denoise(DenoiseSettings(loss="huber", huber_delta=0.1)).loss(backbone, batch, seed=0, step=0)[0]
    assert 0 < huber.item() < square.item()


def test_validation_is_the_same_every_time_and_does_not_depend_on_the_split(backbone, batch):
    objective = Denoise(DenoiseSettings())
    total, count = objective.validation_loss(backbone, batch, seed=1)
    assert count == 4
    assert torch.equal(total, objective.validation_loss(backbone, batch, seed=1)[0])
    halves = [objective.validation_loss(backbone, part(batch, *p), seed=1)[0] for p in ((0, 1), (2, 3))]
    torch.testing.assert_close(sum(halves), total)  # float32 sums
    assert not total.requires_grad


def test_training_lowers_the_loss(tiny_sd_folder, batch):
    backbone = StableDiffusion.open(BaseSettings(name=str(tiny_sd_folder), precision="fp32"))
    backbone.components["unet"].requires_grad_(True)
    optimizer = torch.optim.AdamW(backbone.components["unet"].parameters(), lr=3e-3)
    objective = Denoise(DenoiseSettings())
    before = objective.validation_loss(backbone, batch, seed=0)[0].item()
    for step in range(40):
        total, count = objective.loss(backbone, batch, seed=0, step=step)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert objective.validation_loss(backbone, batch, seed=0)[0].item() < 0.9 * before


def test_the_last_timestep_of_an_epsilon_base_can_be_taught_with_a_weight(tiny_sd_epsilon_folder, batch):
    backbone = StableDiffusion.open(BaseSettings(name=str(tiny_sd_epsilon_folder), precision="fp32"))
    objective = Denoise(DenoiseSettings(weighting="min_snr", timesteps=(999, 999)))
    total, _ = objective.loss(backbone, batch, seed=0, step=0)
    assert torch.isfinite(total)


def test_a_timestep_that_the_base_lacks_is_refused(backbone, batch):
    objective = Denoise(DenoiseSettings(timesteps=(1000, 1200)))
    with pytest.raises(ConfigError, match="this base has timesteps 0 to 999; got 1"):
        objective.loss(backbone, batch, seed=0, step=0)


def test_a_range_that_runs_backwards_is_refused():
    from mmpeft.config import Recipe

    with pytest.raises(ConfigError, match="first and last, in this order"):
        Recipe.build({"out": "x", "data": {"images": "y"}, "objective": {"timesteps": [500, 100]}})


def test_each_sample_may_have_its_own_timesteps():
    objective = Denoise(DenoiseSettings())
    ranges = [(0, 99), (900, 999)] * 4
    drawn = torch.stack(
        [objective.draw_timesteps(range(8), 8, seed=0, step=step, ranges=ranges) for step in range(50)]
    )
    assert drawn[:, ::2].max() <= 99
    assert drawn[:, 1::2].min() >= 900
    settled = Denoise(DenoiseSettings(timesteps=(400, 499)))
    mixed = settled.draw_timesteps(range(4), 4, seed=0, step=0, ranges=[None, (0, 99)] * 2)
    assert all(400 <= timestep <= 499 for timestep in mixed[::2])
    assert mixed[1::2].max() <= 99


def test_an_even_share_of_a_step_brings_prior_samples_whatever_the_split():
    objective = Denoise(DenoiseSettings(prior=PriorSettings(pictures=4, share=0.25)))
    whole = objective.prior_places(range(12), 640, seed=0, step=3)
    split = [place for start in range(0, 12, 5) for place in
             objective.prior_places(range(start, min(start + 5, 12)), 640, seed=0, step=3)]  # fmt: skip
    assert whole == split
    assert len(whole) == 3
    assert all(0 <= place < 640 for place in whole)
    assert whole != objective.prior_places(range(12), 640, seed=0, step=4)


def test_a_prior_that_the_model_keeps_costs_nothing_and_one_that_it_leaves_counts_as_told(backbone, batch):
    noisy, timesteps = torch.randn(2, *batch.mean.shape[1:]), torch.tensor([200, 800])
    conditioning = {name: tensor[:2] for name, tensor in batch.conditioning.items()}
    with torch.no_grad():
        said = backbone.predict(noisy, timesteps, conditioning)

    def loss(prediction, **settings):
        objective = Denoise(DenoiseSettings(prior=PriorSettings(pictures=2, share=0.5, **settings)))
        prior = PriorBatch(noisy, timesteps, prediction, conditioning)
        total, count = objective.loss(backbone, replace(batch, prior=prior), seed=0, step=0)
        assert count == 4
        return total.item()

    alone = Denoise(DenoiseSettings()).loss(backbone, batch, seed=0, step=0)[0].item()
    # float32 of batches of another size.
    assert loss(said) == pytest.approx(alone, rel=1e-4)
    # Two samples that are off by 1 everywhere, weighing 1 / share each.
    assert loss(said + 1) == pytest.approx(alone + 2 / 0.5, rel=1e-4)
    assert loss(said + 1, weight=0.25) == pytest.approx(alone + 0.25 * 2 / 0.5, rel=1e-4)
