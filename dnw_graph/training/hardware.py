"""Checks before a run starts: missing devices, and steps that could only fail."""

from __future__ import annotations

import os

import torch
from torch import nn

from dnw_graph.analysis.memory import free_memory, memory_of
from dnw_graph.errors import InputError
from dnw_graph.recipes.options import RunOptions

# Side of the images sent through the copy: enough for every model, and cheap.
SIDE = 64
# No model stores more than this many times its input: below that, the trial is not worth it.
MOST_PER_INPUT = 1000
# Of a pixel: three 32-bit numbers.
IMAGE_BYTES = 12
BITS = {"32-true": 32, "16-mixed": 16, "bf16-mixed": 16, "64-true": 64}


def on_gpu(options: RunOptions) -> bool:
    """Return whether a run is on GPUs."""
    return options.accelerator != "cpu" and torch.cuda.device_count() > 0


def check_hardware(options: RunOptions) -> None:
    """Refuse devices and precisions that this machine does not have.

    Raises:
        InputError: If devices are missing or cannot compute in the precision.
    """
    gpus = torch.cuda.device_count()
    if options.accelerator == "gpu" and not gpus:
        raise InputError("--accelerator is 'gpu', but no GPU is available: give --accelerator cpu")
    if on_gpu(options) and options.devices > gpus:
        raise InputError(f"--devices is {options.devices}, but there are {gpus} GPUs: give {gpus} or fewer")
    if options.precision == "16-mixed" and not on_gpu(options):
        raise InputError("--precision 16-mixed needs a GPU: give bf16-mixed or 32-true")


def check_step(model: nn.Module, size: int, options: RunOptions, gpu: bool) -> None:
    """Refuse a run whose first step could only fail.

    Args:
        model: The model, which stays unchanged.
        size: Height and width of the images.
        options: Options of the run.
        gpu: Whether the run is on GPUs.

    Raises:
        InputError: If single images are too few for the norms of the model, or a batch needs more memory than is free.
    """
    training = options.evaluate is None
    _check_memory(model, size, options, gpu, training)
    if training and options.batch_size == options.devices * options.num_nodes * options.accumulate:
        try:
            memory_of(model, (1, 3, size, size), training)
        except ValueError as error:
            raise InputError(
                f"--batch-size {options.batch_size} leaves one image at a time, too few for the norms of this model "
                f"({error}): give a larger --batch-size or --image-size"
            ) from error


def _check_memory(model: nn.Module, size: int, options: RunOptions, gpu: bool, training: bool) -> None:
    own_gpu = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    free = torch.cuda.mem_get_info(own_gpu)[0] if gpu else free_memory()
    batch = options.batch_size // options.num_nodes // (options.devices if gpu else 1) // options.accumulate
    pixels = batch * size**2
    if free is None or MOST_PER_INPUT * IMAGE_BYTES * pixels <= free:
        return
    side = min(size, SIDE)
    try:
        two, four = (memory_of(model, (images, 3, side, side), training) for images in (2, 4))
    except (RuntimeError, ValueError):
        two = four = 0  # the model takes no smaller images, so count the images only
    per_pixel = (four - two) / (2 * side**2) * BITS[options.precision] / 32
    needed = pixels * (IMAGE_BYTES + per_pixel)
    if needed > free:
        raise InputError(
            f"--image-size {size} with --batch-size {options.batch_size} needs at least "
            f"{needed / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB are free: give smaller ones"
        )
