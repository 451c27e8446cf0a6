"""How the learning rate changes over a run: factors of the first learning rate, as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from dnw_graph.arguments import checked, require


@checked
def cosine(num_steps: int) -> Callable[[int], float]:
    """Return (1 + cos(π t / T)) / 2 over T = ``num_steps`` steps: 1 at the first step, 0 after the last.

    Args:
        num_steps: Optimiser steps of the whole run.
    """
    require(num_steps >= 1, "num_steps", "an integer from 1 up", num_steps)
    return lambda step: (1 + math.cos(math.pi * step / num_steps)) / 2


@checked
def after_warmup(
    schedule: Callable[[int], Callable[[int], float]], warmup_steps: int, num_steps: int
) -> Callable[[int], float]:
    """Return a linear rise over the first W = ``warmup_steps`` steps, followed by a schedule over the others.

    Step t < W has the factor (t + 1) / W, so that the first step has 1 / W and the last one of the rise has 1; step
    t ≥ W has the schedule's factor at t - W.

    Args:
        schedule: One of ``SCHEDULES``.
        warmup_steps: Steps of the rise, fewer than ``num_steps``; 0 for none.
        num_steps: Optimiser steps of the whole run.
    """
    after = schedule(num_steps - warmup_steps)
    return lambda step: (step + 1) / warmup_steps if step < warmup_steps else after(step - warmup_steps)


@checked
def step(num_steps: int) -> Callable[[int], float]:
    """Return 1, ×0.1 after half and again after three quarters of the steps: after epochs 80 and 120 of 160.

    Args:
        num_steps: Optimiser steps of the whole run.
    """
    require(num_steps >= 1, "num_steps", "an integer from 1 up", num_steps)
    return lambda step: 0.1 ** ((step >= num_steps / 2) + (step >= num_steps * 3 / 4))


SCHEDULES: dict[str, Callable[[int], Callable[[int], float]]] = {"cosine": cosine, "step": step}
