"""Memory: what is free, and what a forward pass of a model takes."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Where a container finds its limit and what it uses (control groups, versions 2 and 1).
GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def free_memory() -> int | None:
    """Return how many bytes of memory the machine has free, or what its container may still take; None if unknown."""
    free = []
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        numbers = {name.rstrip(":"): int(number) * 1024 for name, number, *_ in lines}
        free.append(numbers["MemAvailable"] + numbers["SwapFree"])
    except (OSError, KeyError, ValueError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for group, limit, used in GROUPS:
        with suppress(OSError, ValueError, KeyError):  # no such group, or a limit of "max"
            stat = dict(line.split() for line in Path(group, "memory.stat").read_text().splitlines())
            cached = int(stat["inactive_file"])  # given back when it is needed
            free.append(int(Path(group, limit).read_text()) - int(Path(group, used).read_text()) + cached)
    return min(free, default=None)


def memory_of(model: nn.Module, size: Sequence[int], training: bool) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, or those of its largest output without one.

    A copy of the model is tried; the model and the generators of random numbers stay as they are.

    Args:
        model: The model.
        size: Size of the input.
        training: Whether the pass is one of training.
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
        weight = next(trial.parameters())
        x = torch.zeros(*size, dtype=weight.dtype, device=weight.device)
        with torch.set_grad_enabled(training), saved_tensors_hooks(keep, lambda tensor: tensor):
            trial(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) if training else largest
