"""The gradient of one optimiser step: summed over micro-batches and processes, divided by the step's total count."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmpeft.errors import TrainingError
from mmpeft.trainers.task import ParameterGroup

if TYPE_CHECKING:
    from accelerate import Accelerator

# Parameters begin at multiples of this in the buffer: 64 bytes, which every vectorised kernel is content with.
_ALIGNMENT = 16
# Loss sum, count, processes that were asked to stop: they travel behind the gradient in the same all-reduce.
_TALLIES = 3


@dataclass(frozen=True)
class StepTotal:
    """What all processes agree on after a step's backward passes."""

    loss: float
    """mean over the step's count"""
    count: float
    """samples, trained tokens or pairs"""
    gradient_norm: float
    """before clipping"""
    stop: bool
    """some process was asked to stop"""


class StepGradient:
    """One float32 buffer of which every learning parameter's `.grad` is a view.

    Backward passes add up in it, and one all-reduce sums it over the processes. A process without a micro-batch
    takes part with zeros, so that any split of a step gives the same mean.

    Args:
        loss_scale: what each loss is multiplied with before its backward pass, and the sum divided by after it: a power
            of two, which changes no digit, but keeps small gradients inside float16's range (Micikevicius et al. 2017,
            "Mixed Precision Training", arXiv:1710.03740, section 3.2).

    Raises:
        TrainingError: a parameter is not float32, or not on the accelerator's device.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], accelerator: "Accelerator", loss_scale: float = 1.0
    ) -> None:
        self._groups = tuple(groups)
        self._loss_scale = loss_scale
        self._accelerator = accelerator
        self._learning: tuple[str, ...] | None = None
        self._buffer = torch.empty(0)
        for group in groups:
            for name, parameter in group.parameters.items():
                if parameter.dtype != torch.float32 or parameter.device.type != accelerator.device.type:
                    raise TrainingError(
                        f"{group.name}: {name} is {parameter.dtype} on {parameter.device}; trained parameters must be "
                        f"float32 on {accelerator.device}"
                    )

    def open(self, learning: Sequence[ParameterGroup]) -> None:
        """Set the gradient to zero; parameters outside `learning` get none, so that no optimiser touches them."""
        names = tuple(group.name for group in learning)
        if names != self._learning:
            self._lay_out(learning)
            self._learning = names
        self._buffer.zero_()

    def add(self, loss_sum: Tensor, count: int) -> None:
        """Run the backward pass of one micro-batch's loss sum, a scalar, and add its tallies."""
        (loss_sum * self._loss_scale).backward()
        self._buffer[-3] += loss_sum.detach()
        self._buffer[-2] += count

    def close(self, *, stop: bool) -> StepTotal:
        """Sum over the processes and divide by the count; a count of 0 leaves the sums as they are."""
        self._buffer[-1] += float(stop)
        if self._accelerator.num_processes > 1:
            self._buffer.copy_(self._accelerator.reduce(self._buffer, reduction="sum"))
        loss_sum, count, stops = self._buffer[-_TALLIES:].tolist()
        gradient = self._buffer[:-_TALLIES]
        gradient.div_(max(count, 1.0) * self._loss_scale)
        norm = torch.linalg.vector_norm(gradient).item()
        return StepTotal(loss_sum / max(count, 1.0), count, norm, stops > 0)

    def clip(self, norm: float, largest: float | None) -> None:
        """Scale the gradient, whose norm is given, down to a largest norm.

        Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", arXiv:1211.5063, algorithm 1.
        """
        if largest is not None and norm > largest:
            self._buffer[:-_TALLIES].mul_(largest / norm)

    def release(self) -> None:
        """Take the gradients off the parameters, which are all free to learn again."""
        for group in self._groups:
            for parameter in group.parameters.values():
                parameter.grad = None
                parameter.requires_grad_(True)
        self._learning = None

    def _lay_out(self, learning: Sequence[ParameterGroup]) -> None:
        self.release()
        parameters = [parameter for group in learning for parameter in group.parameters.values()]
        sizes = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in parameters]
        self._buffer = torch.zeros(sum(sizes) + _TALLIES, device=self._accelerator.device)
        start = 0
        for parameter, size in zip(parameters, sizes, strict=True):
            parameter.grad = self._buffer[start : start + parameter.numel()].view(parameter.shape)
            start += size
        for group in self._groups:
            for parameter in group.parameters.values():
                # A frozen parameter also costs no backward pass.
                parameter.requires_grad_(parameter.grad is not None)
