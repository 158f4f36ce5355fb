"""An exponential moving average of the trained parameters, which takes their place when the run is looked at."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """Average parameters over the steps of a run.

    average <- d average + (1 - d) parameter, with d = min(decay, (1 + step) / (10 + step)): early steps are
    forgotten sooner, so that a short run is not held back by where it started.

    Args:
        parameters: by name; the average begins at their values.
        decay: what d grows to, in (0, 1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters in after a step, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), list(self._parameters.values()), 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages where the parameters are within a with block; the parameters come back bit for bit."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._fill(self.averages)
        try:
            yield
        finally:
            self._fill(kept)

    def settle(self) -> None:
        """Put the averages where the parameters are, for good: the model is then what was saved."""
        self._fill(self.averages)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
