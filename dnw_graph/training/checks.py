"""What can be refused before a run starts, so that no work is lost."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from dnw_graph.errors import InputError
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


@rank_zero_only
def check_files(*parts: Images) -> None:
    """Look at the files of all images that are files.

    Raises:
        InputError: If any of them is broken.
    """
    paths = [path for part in parts if isinstance(part, FileImages) for path in part.paths]
    if len(paths) >= MANY_IMAGES:
        print(f"checking {len(paths):,} image files (--no-check-images skips this)", flush=True)
    check_images(paths)


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
    for name in names:
        if name not in then:
            raise InputError(f"{path} is a checkpoint of another program: it knows no {flag(name)}")
        if then[name] == now[name]:
            continue
        if name == "classes":
            given, trained = (f"{len(c)} classes, {c[0]!r} ... {c[-1]!r}" for c in (now[name], then[name]))
            name = "data"
        elif name == "train_images":
            given, trained = (f"{n:,} training images" for n in (now[name], then[name]))
            name = "data"
        else:
            given, trained = repr(now[name]), repr(then[name])
        raise InputError(
            f"{flag(name)} is {given}, but {path} was trained with {trained}: "
            "give what it was trained with, or start a new run"
        )


def output_folder(options: RunOptions) -> Path:
    """Return the folder of a training run, made if needed.

    Raises:
        InputError: If it cannot be written to, or holds another run.
    """
    if options.output is not None:
        folder = Path(options.output)
    elif options.resume is not None:
        folder = Path(options.resume).parent
    else:
        folder = next(path for n in itertools.count(1) if not (path := Path("runs", str(n))).exists())
    last = folder / "last.ckpt"
    if os.path.exists(last) and not options.resume:
        raise InputError(f"{folder} already holds a run: continue it with --resume {last}, or give another --output")
    make_writable(folder)
    return folder


@rank_zero_only
def make_writable(folder: Path) -> None:
    """Make a folder if needed and see that files can be made in it.

    Raises:
        InputError: If not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to output folder {folder} ({error.strerror}): give another one with --output"
        ) from error
