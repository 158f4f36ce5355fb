"""The contract of a task: what is trained, as far as the loop needs to know it."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at one rate, and for how long."""

    name: str
    """of the component, as the recipe says it"""
    parameters: Mapping[str, nn.Parameter]
    """float32, by names that are unique within the group and the same in every run"""
    learning_rate: float
    """at the peak of the schedule"""
    stop_after: float = 1.0
    """share of the run's steps after which it stays as it is, in (0, 1]"""

    def learns_at(self, step: int, steps: int) -> bool:
        """Say whether a step, counted from 0, of a run of `steps` still changes it; the first step always does."""
        return step < max(1, round(self.stop_after * steps))


class Task(Protocol):
    """What is trained, as far as the loop needs to know it."""

    @property
    def groups(self) -> Sequence[Hashable]:
        """The bucket of every training sample, repeats expanded."""

    @property
    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """What learns."""

    @property
    def loss_scale(self) -> float:
        """What losses are scaled by on their way through the model: 1, but for float16."""

    def loss(
        self, samples: Sequence[tuple[int, int]], *, step: int, epoch: int, step_size: int
    ) -> tuple[Tensor, int]:
        """Compute a micro-batch's loss sum, a differentiable scalar, and its count of samples, tokens or pairs.

        Args:
            samples: (position in the step, sample) of each; draws are keyed by them, so that no split changes them.
            step: from 0.
            epoch: from 0.
            step_size: samples of a full step.
        """

    def sample_names(self, indices: Sequence[int]) -> list[str]:
        """Name the files of samples, for an error."""

    def validate(self) -> float | None:
        """Measure the loss on held-out samples, at fixed draws; none without any."""

    def preview(self, step: int, folder: Path) -> None:
        """Draw the preview pictures into a folder, as png; the folder is there."""

    def save(self, folder: Path, *, step: int, metrics: Mapping[str, float]) -> None:
        """Write the adapter into an empty folder; the same parameters and metrics give the same bytes."""
