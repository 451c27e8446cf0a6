"""Seeds that are functions of a position, so that nothing about a generator needs to be saved."""

from __future__ import annotations

import numpy as np


def mix(*words: int) -> int:
    """Return a 64-bit seed from integers ≥ 0, such as (seed, step)."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
