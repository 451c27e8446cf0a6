"""How the learning rate changes over a run: factors of the first learning rate, as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(num_steps: int) -> Callable[[int], float]:
    """Return (1 + cos(π t / T)) / 2 over T = ``num_steps`` steps: 1 at the first step, 0 after the last.

    Args:
        num_steps: Optimiser steps of the whole run.
    """
    return lambda step: (1 + math.cos(math.pi * step / num_steps)) / 2


def step(num_steps: int) -> Callable[[int], float]:
    """Return 1, ×0.1 after half and again after three quarters of the steps: after epochs 80 and 120 of 160.

    Args:
        num_steps: Optimiser steps of the whole run.
    """
    return lambda step: 0.1 ** ((step >= num_steps / 2) + (step >= num_steps * 3 / 4))


SCHEDULES: dict[str, Callable[[int], Callable[[int], float]]] = {"cosine": cosine, "step": step}
