"""How much each timestep's error counts: losses and weights, each a pure function."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.diffusion.noise_schedule import Prediction
from mmpeft.errors import ConfigError


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Average the squared error over each sample.

    Args:
        prediction: (B, C, h, w), any float type.
        target: (B, C, h, w), float32.

    Returns:
        (B,), float32, >= 0.
    """
    return (prediction.float() - target).square().flatten(1).mean(1)


def huber_error(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    """Average the smooth Huber error over each sample, so that a few wild pixels do not dominate.

    2 delta (sqrt(e² + delta²) - delta): e² for errors well below `delta`, 2 delta |e| well above.
    Charbonnier et al. 1997, "Deterministic Edge-Preserving Regularization in Computed Imaging", IEEE TIP 6(2);
    Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber
    Loss", arXiv:2403.16728, without its schedule. Shapes as in `squared_error`.

    Args:
        delta: the error at which it turns from square to straight, > 0, in units of the target (deviation 1).
    """
    error = (prediction.float() - target).square()
    # The same as the formula above, without the difference of two nearly equal roots.
    return (2 * delta * error / ((error + delta**2).sqrt() + delta)).flatten(1).mean(1)


def min_snr_weight(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Weight each sample's loss so that easy timesteps do not dominate.

    min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v.
    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv:2303.09556.

    Args:
        snr: signal-to-noise power ratio of each sample, (B,), float32, >= 0.
        gamma: the clip, same unit as `snr`; the paper uses 5.

    Returns:
        (B,), float32, on `snr`'s device.

    Raises:
        ConfigError: `prediction` is flow, for which the paper gives no weight, or epsilon with a zero `snr` (0/0).
    """
    if prediction == "epsilon":
        _refuse_zero(snr, "min_snr")
        return snr.clamp(max=gamma) / snr
    if prediction == "v":
        return snr.clamp(max=gamma) / (snr + 1)
    raise ConfigError("objective.weighting: min_snr is defined for epsilon and v; this base predicts flow")


def snr_plus_one_weight(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Weight as min-SNR does, but keep full weight at high noise, where shapes are decided.

    min(snr + 1, gamma) / (snr + 1) for v, which is the weight min(snr + 1, gamma) on the error of x_0: SNR+1 of
    Salimans and Ho 2022, arXiv:2202.00512, section 4, clipped as in Hang et al. 2023, arXiv:2303.09556.
    min(snr + 1, gamma) / snr for epsilon, the same weight on the error of x_0. Of v it never exceeds 1, and at
    snr 0 it is 1 where min-SNR's is 0.

    Args:
        snr: signal-to-noise power ratio of each sample, (B,), float32, >= 0.
        gamma: the clip, same unit as `snr`; at least 1, or v's weight would be below 1 everywhere.

    Returns:
        (B,), float32, on `snr`'s device.

    Raises:
        ConfigError: `prediction` is flow, or epsilon with a zero `snr` (division by zero).
    """
    if prediction == "epsilon":
        _refuse_zero(snr, "snr_plus_one")
        return (snr + 1).clamp(max=gamma) / snr
    if prediction == "v":
        return (snr + 1).clamp(max=gamma) / (snr + 1)
    raise ConfigError(
        "objective.weighting: snr_plus_one is defined for epsilon and v; this base predicts flow"
    )


def debiased_weight(snr: Tensor, prediction: Prediction) -> Tensor:
    """Weight so that the error of the estimated picture counts alike at all timesteps, softly.

    1 / sqrt(min(snr, 1000)) for epsilon: Yu et al. 2023, "Debias the Training of Diffusion Models",
    arXiv:2310.08442; times snr / (snr + 1) for v, which is the same weight on the error of x_0.

    Args:
        snr: signal-to-noise power ratio of each sample, (B,), float32, >= 0.

    Returns:
        (B,), float32, on `snr`'s device.

    Raises:
        ConfigError: `prediction` is flow, or epsilon with a zero `snr` (division by zero).
    """
    # The bound keeps the nearly clean timesteps from counting nothing, as in the paper's code.
    bounded = snr.clamp(max=1000)
    if prediction == "epsilon":
        _refuse_zero(snr, "debiased")
        return bounded.rsqrt()
    if prediction == "v":
        return snr / (bounded.sqrt() * (snr + 1)).clamp(min=torch.finfo(snr.dtype).tiny)
    raise ConfigError("objective.weighting: debiased is defined for epsilon and v; this base predicts flow")


def _refuse_zero(snr: Tensor, weighting: str) -> None:
    if bool((snr == 0).any()):
        raise ConfigError(
            f"objective.weighting: {weighting} divides by the signal-to-noise ratio, which is 0 at this base's last "
            f"timestep; use none, or end the timestep range before it"
        )
