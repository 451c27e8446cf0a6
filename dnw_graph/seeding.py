"""Seeds that are functions of a position, so that nothing about a generator needs to be saved."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def mix(*words: int) -> int:
    """Return a 64-bit seed from integers ≥ 0, such as (seed, step)."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def generator_state(device: torch.device) -> int:
    """Return a checksum of the state of PyTorch's generator for a device, which changes with every number drawn."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return zlib.crc32(bytes(state.tolist()))  # A list, which can be read under FakeTensorMode too.
