"""What can be refused before a run starts, so that no work is lost."""

from __future__ import annotations

from typing import Any

import torch

from dnw_graph.errors import InputError
from dnw_graph.node_functions import EPS
from dnw_graph.stopping import is_first_process
from dnw_graph.training.image_check import check_images
from dnw_graph.training.images import FileImages, Images
from dnw_graph.training.options import RunOptions, flag

# Images from which on the check of the files is announced, since it takes seconds.
MANY_IMAGES = 20_000


def on_gpu(options: RunOptions) -> bool:
    """Return whether a run is on GPUs."""
    return options.accelerator != "cpu" and torch.cuda.device_count() > 0


def check_hardware(options: RunOptions) -> None:
    """Refuse what this machine does not have.

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


def check_files(*parts: Images) -> None:
    """Look at the files of all images that are files; in the first process of a run.

    Raises:
        InputError: If any of them is broken.
    """
    if not is_first_process():
        return
    paths = [path for part in parts if isinstance(part, FileImages) for path in part.paths]
    if len(paths) >= MANY_IMAGES:
        print(f"checking {len(paths):,} image files (--no-check-images skips this)", flush=True)
    check_images(paths)


# Options that checkpoints of older runs lack, and what they were.
BEFORE = {"node_norm_eps": EPS}


def check_same_run(path: str, then: dict[str, Any], now: dict[str, Any], names: list[str]) -> None:
    """Refuse a checkpoint of another run.

    Args:
        path: The checkpoint.
        then: Options of the run that wrote it.
        now: Options of this run.
        names: Options to compare.

    Raises:
        InputError: If an option differs; the message names the first one that does.
    """
    then = {**BEFORE, **then}
    for name in names:
        if name not in then:
            raise InputError(f"{path} is a checkpoint of another program: it knows no {flag(name)}")
        if then[name] == now[name]:
            continue
        given, trained = (_shown(name, value) for value in (now[name], then[name]))
        name = "data" if name in ("classes", "train_images") else name
        raise InputError(
            f"{flag(name)} is {given}, but {path} was trained with {trained}: "
            "give what it was trained with, or start a new run"
        )


def _shown(name: str, value: Any) -> str:
    if name == "classes" and isinstance(value, list) and value:
        return f"{len(value)} classes, {str(value[0])[:50]!r} ... {str(value[-1])[:50]!r}"
    if name == "train_images" and isinstance(value, int):
        return f"{value:,} training images"
    return repr(value)[:100]
