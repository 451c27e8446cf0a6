"""What one step of a run takes, tried out on a copy of the model before the run starts."""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dnw_graph.errors import InputError
from dnw_graph.training.options import RunOptions

# Side of the images that are sent through the copy: enough for every model, and little work.
SIDE = 64
# No model keeps more than so many times its input: up to there an estimate is not worth the trial.
MOST_PER_INPUT = 1000
# Of a pixel: three numbers of 32 bits.
IMAGE_BYTES = 12
BITS = {"32-true": 32, "16-mixed": 16, "bf16-mixed": 16, "64-true": 64}
# Where a container finds its limit and what it uses (control groups, versions 2 and 1).
GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def check_step(model: nn.Module, size: int, options: RunOptions, gpu: bool) -> None:
    """Refuse a run whose first step could only fail.

    Args:
        model: The model; it stays as it is.
        size: Height and width of the images.
        options: Options of the run.
        gpu: Whether the run is on GPUs.

    Raises:
        InputError: If single images are too few for the norms of the model, or a batch needs more memory than is free.
    """
    training = options.evaluate is None
    _check_memory(model, size, options, gpu, training)
    if training and options.batch_size == options.devices * options.num_nodes:
        try:
            _send(model, 1, size, training)
        except ValueError as error:
            raise InputError(
                f"--batch-size {options.batch_size} leaves one image per device, too few for the norms of this model "
                f"({error}): give a larger --batch-size or --image-size"
            ) from error


def _check_memory(model: nn.Module, size: int, options: RunOptions, gpu: bool, training: bool) -> None:
    free = torch.cuda.mem_get_info()[0] if gpu else free_memory()
    batch = options.batch_size // options.num_nodes // (options.devices if gpu else 1)
    pixels = batch * size**2
    if free is None or MOST_PER_INPUT * IMAGE_BYTES * pixels <= free:
        return
    side = min(size, SIDE)
    try:
        two, four = (_send(model, images, side, training) for images in (2, 4))
    except (RuntimeError, ValueError):
        two = four = 0  # of a model that takes no smaller images; what they are themselves is known
    per_pixel = (four - two) / (2 * side**2) * BITS[options.precision] / 32
    needed = pixels * (IMAGE_BYTES + per_pixel)
    if needed > free:
        raise InputError(
            f"--image-size {size} with --batch-size {options.batch_size} needs at least {_gigabytes(needed)} of "
            f"memory, and {_gigabytes(free)} are free: give a smaller --image-size or --batch-size"
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


def _send(model: nn.Module, images: int, side: int, training: bool) -> int:
    """Send images through a copy; return the bytes kept for the backward pass, or of the largest output without one."""
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
        x = torch.zeros(images, 3, side, side, dtype=weight.dtype, device=weight.device)
        with torch.set_grad_enabled(training), saved_tensors_hooks(keep, lambda tensor: tensor):
            trial(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) if training else largest


def _gigabytes(number: int | float) -> str:
    return f"{number / 2**30:,.1f} GiB"
