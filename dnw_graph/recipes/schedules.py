"""Learning-rate schedules: each function returns a factory of a PyTorch scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from dnw_graph.arguments import checked, require

Schedule = Callable[[Optimizer], LRScheduler]


@checked
def cosine(num_steps: int) -> Schedule:
    """Return the factor (1 + cos(π t / T)) / 2 over T = ``num_steps`` steps: 1 at the first step, 0 after the last."""
    require(num_steps >= 1, "num_steps", "an integer >= 1", num_steps)
    return partial(CosineAnnealingLR, T_max=num_steps)


@checked
def step(num_steps: int) -> Schedule:
    """Return the factor 1, ×0.1 after half and again after three quarters of ``num_steps`` (epochs 80, 120 of 160)."""
    require(num_steps >= 1, "num_steps", "an integer >= 1", num_steps)
    return partial(MultiStepLR, milestones=[math.ceil(num_steps / 2), math.ceil(num_steps * 3 / 4)])


@checked
def after_warmup(schedule: Callable[[int], Schedule], warmup_steps: int, num_steps: int) -> Schedule:
    """Return a linear rise over the first W = ``warmup_steps`` steps, followed by a schedule over the others.

    Step t < W has the factor (t + 1) / W: 1 / W at the first step, 1 at the last step of the rise.

    Args:
        schedule: One of ``SCHEDULES``.
        warmup_steps: Steps of the rise, fewer than ``num_steps``; 0 for none.
        num_steps: Optimiser steps of the whole run.
    """
    after = schedule(num_steps - warmup_steps)

    def both(optimizer: Optimizer) -> LRScheduler:
        rise = LinearLR(optimizer, 1 / warmup_steps, total_iters=warmup_steps - 1)
        return SequentialLR(optimizer, [rise, after(optimizer)], [warmup_steps])

    return both if warmup_steps else after


SCHEDULES: dict[str, Callable[[int], Schedule]] = {"cosine": cosine, "step": step}
