"""Learning-rate schedules, as functions of the step: nothing to save, nothing to fall out of step on resume."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def factor(schedule: Schedule, step: int, *, steps: int, warmup_steps: int = 0) -> float:
    """Give the share of the peak learning rate that a step uses.

    It rises as (step + 1) / warmup_steps, so that no step is lost at 0, and then falls from 1 towards the 0 that a step
    after the last one would have: linearly, or along half a cosine (Loshchilov and Hutter 2017, "SGDR: Stochastic
    Gradient Descent with Warm Restarts", arXiv:1608.03983, equation 5, one period). A run whose `steps` grow
    takes, from there on, the rate that the longer run has at that step: with linear and cosine it jumps up.

    Args:
        step: from 0, the step about to be taken, < `steps`.
        steps: of the whole run.
        warmup_steps: may exceed `steps`; the peak is then never reached.

    Returns:
        In (0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    gone = (step - warmup_steps) / (steps - warmup_steps)
    return 1.0 - gone if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * gone))
