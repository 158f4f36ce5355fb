"""The loop that every part of the pocket base is trained with, its learning-rate schedule and its averaging."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from mmpeft.errors import TrainingError


def fit(
    batch_loss: Callable[[float], Tensor],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    name: str,
    steps: int,
    warmup: int,
    hold: float = 0.0,
    floor: float = 0.02,
    max_norm: float | None = 1.0,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Run a number of optimiser steps.

    Args:
        batch_loss: draws a batch and gives its scalar loss; it is told the progress, in [0, 1).
        model: what is trained.
        optimizers: all of them step each time; their learning rates are the highest of the schedule.
        name: what the progress bar says; there is none when the output is not a terminal.
        warmup: steps that the learning rate rises over.
        hold: share of the steps before the learning rate falls, along half a cosine.
        floor: what it falls to, as a share of the highest.
        max_norm: a gradient longer than this, over all parameters, is scaled down to it; None for never.
        after_step: called with the number of steps done.

    Raises:
        TrainingError: the loss is not finite.
    """
    schedules = [
        LambdaLR(optimizer, lambda done: learning_rate_share(done, steps, warmup, hold, floor))
        for optimizer in optimizers
    ]
    with tqdm(total=steps, desc=name, disable=None, unit="step") as bar:
        for step in range(steps):
            loss = batch_loss(step / steps)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"{name}: loss is {loss.item()} at step {step}; try a lower learning rate"
                )
            model.zero_grad()
            loss.backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            if after_step:
                after_step(step + 1)
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()


def learning_rate_share(done: int, steps: int, warmup: int, hold: float, floor: float) -> float:
    """Give the learning rate of the step after `done` steps as a share of the highest one."""
    rising = min(1.0, (done + 1) / warmup)
    falling = max(0.0, (done / steps - hold) / (1 - hold))
    return rising * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * falling)))


def averaged(model: nn.Module, limit: float, warmup: int = 10) -> AveragedModel:
    """Follow a model with an exponential moving average of its parameters.

    Args:
        limit: share of the old average that an update keeps, once many updates were made.
        warmup: updates over which the share rises, so that the random start is soon forgotten.
    """

    def blend(old: Sequence[Tensor], new: Sequence[Tensor], count: Tensor | int) -> None:
        keep = min(limit, (int(count) + 1) / (int(count) + warmup))
        for average, value in zip(old, new, strict=True):
            average.lerp_(value, 1 - keep)

    return AveragedModel(model, multi_avg_fn=blend)


class MuonForKernels(torch.optim.Muon):
    """Muon for matrices and for channels-last convolution kernels, seen as (out, kh * kw * in) matrices.

    Momentum, orthogonalised (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"),
    scaled by 0.2 sqrt(max(rows, columns)) to the size of AdamW's updates (Liu et al. 2025, "Muon is Scalable for
    LLM Training", arXiv:2502.16982), so that both share one learning rate.
    """

    def __init__(self, weights: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> None:
        self._weights = list(weights)
        # They share the weights' memory: torch refuses to view a kernel so that is not channels-last.
        self._matrices = [_kernel_rows(weight.detach()).view(len(weight), -1) for weight in self._weights]
        super().__init__(
            self._matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )

    def step(self, closure: Any = None) -> Any:
        """Update the weights in place from their gradients."""
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.grad = None if weight.grad is None else _kernel_rows(weight.grad).reshape(matrix.shape)
        return super().step(closure)  # type: ignore[no-untyped-call]


def _kernel_rows(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
