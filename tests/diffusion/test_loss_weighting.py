import math

import pytest
import torch

from mmpeft.diffusion.loss_weighting import (
    debiased_weight,
    huber_error,
    min_snr_weight,
    snr_plus_one_weight,
    squared_error,
)
from mmpeft.errors import ConfigError

SNR = torch.tensor([0.01, 1.0, 5.0, 100.0])


def test_min_snr_is_the_papers_weight():
    torch.testing.assert_close(min_snr_weight(SNR, 5, "epsilon"), torch.tensor([1.0, 1.0, 1.0, 0.05]))
    torch.testing.assert_close(min_snr_weight(SNR, 5, "v"), torch.tensor([0.01 / 1.01, 0.5, 5 / 6, 5 / 101]))


def test_snr_plus_one_keeps_full_weight_where_there_is_only_noise():
    snr = torch.tensor([0.0, 1.0, 5.0, 9.0])
    torch.testing.assert_close(snr_plus_one_weight(snr, 6, "v"), torch.tensor([1.0, 1.0, 1.0, 0.6]))
    assert min_snr_weight(snr, 5, "v")[0] == 0


def test_debiased_is_the_papers_weight():
    torch.testing.assert_close(debiased_weight(SNR, "epsilon"), SNR.rsqrt())
    assert debiased_weight(torch.tensor([1e6]), "epsilon").item() == pytest.approx(1 / math.sqrt(1000))
    assert debiased_weight(torch.zeros(1), "v").item() == 0


@pytest.mark.parametrize(
    "weight",
    [
        lambda p: min_snr_weight(SNR, 5, p),
        lambda p: snr_plus_one_weight(SNR, 5, p),
        lambda p: debiased_weight(SNR, p),
    ],
)
def test_both_predictions_weigh_the_error_of_the_clean_latents_alike(weight):
    # An error of x_0 is snr times as large, squared, in epsilon and (snr + 1) times in v.
    torch.testing.assert_close(weight("epsilon") * SNR, weight("v") * (SNR + 1))


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("min_snr", lambda snr, p: min_snr_weight(snr, 5, p)),
        ("snr_plus_one", lambda snr, p: snr_plus_one_weight(snr, 5, p)),
        ("debiased", lambda snr, p: debiased_weight(snr, p)),
    ],
)
def test_what_has_no_weight_is_refused(name, weight):
    with pytest.raises(ConfigError, match=f"objective.weighting: {name} divides by"):
        weight(torch.zeros(1), "epsilon")
    with pytest.raises(ConfigError, match=f"objective.weighting: {name} is defined for epsilon and v"):
        weight(SNR, "flow")


def test_huber_is_square_for_small_errors_and_straight_for_large_ones():
    target = torch.zeros(1, 1, 1, 1)
    # rtol: the next term of the series is (error / delta)² / 4
    assert huber_error(target + 1e-2, target, 1.0).item() == pytest.approx(1e-4, rel=1e-3)
    assert huber_error(target + 1e3, target, 0.1).item() == pytest.approx(2 * 0.1 * 1e3, rel=1e-3)


def test_errors_are_means_over_each_sample():
    prediction = torch.arange(8.0).reshape(2, 1, 2, 2)
    expected = torch.tensor([(0 + 1 + 4 + 9) / 4, (16 + 25 + 36 + 49) / 4])
    torch.testing.assert_close(squared_error(prediction.half(), torch.zeros(2, 1, 2, 2)), expected)
