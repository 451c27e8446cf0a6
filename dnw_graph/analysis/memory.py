"""Measures free memory, and the memory that a forward pass takes."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dnw_graph.usual import first_floats

# Files with the memory limit and use of a container (control groups, versions 2 and 1).
GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def free_memory() -> int | None:
    """Return the free memory of the machine or its container in bytes; None if unknown."""
    free = []
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        numbers = {name.rstrip(":"): int(number) * 1024 for name, number, *_ in lines}
        free.append(numbers["MemAvailable"] + numbers["SwapFree"])
    except (OSError, KeyError, ValueError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for group, limit, used in GROUPS:
        with suppress(OSError, ValueError, KeyError):  # No such group, or its limit is "max".
            stat = dict(line.split() for line in Path(group, "memory.stat").read_text().splitlines())
            cached = int(stat["inactive_file"])  # Freed when needed.
            free.append(int(Path(group, limit).read_text()) - int(Path(group, used).read_text()) + cached)
    return min(free, default=None)


def memory_of(model: nn.Module, size: Sequence[int], training: bool) -> int:
    """Return the bytes that a training pass stores for the backward pass, or those of the largest output in evaluation.

    A copy of the model is run; the model and the random number generators stay unchanged.

    Args:
        model: The model.
        size: Size of the input.
        training: Whether to measure a training pass.
    """
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    largest = 0

    def measure(module: nn.Module, given: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.nbytes)

    with torch.random.fork_rng(devices=[]):
        trial = copy.deepcopy(model).train(training)
        for module in trial.modules():
            module.register_forward_hook(measure)
        x = first_floats(trial).new_zeros(*size)
        with torch.set_grad_enabled(training), saved_tensors_hooks(keep, lambda tensor: tensor):
            trial(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) if training else largest
