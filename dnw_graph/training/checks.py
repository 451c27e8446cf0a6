"""What can be refused before a run starts, so that no work is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
# Classes that are listed.
MANY_CLASSES = 50


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


def check_files(classes: Sequence[str], *parts: Images) -> None:
    """Look at the files of all images that are files, and say what each class has; in the first process of a run.

    Args:
        classes: Names of the classes.
        parts: The images.

    Raises:
        InputError: If any of them is broken.
    """
    files = [part for part in parts if isinstance(part, FileImages)]
    if not files or not is_first_process():
        return
    paths = [path for part in files for path in part.paths]
    if len(paths) >= MANY_IMAGES:
        print(f"checking {len(paths):,} image files (--no-check-images skips this)", flush=True)
    kinds = check_images(paths)
    labels = [int(label) for part in files for label in part.labels]
    for line in class_lines(classes, labels, kinds, sum((part.ignored for part in files), Counter())):
        print(line, flush=True)


def class_lines(
    classes: Sequence[str], labels: Sequence[int], kinds: Sequence[str], ignored: Counter[tuple[str, str]]
) -> list[str]:
    """Return a line per class: images, formats and modes, and other files; of many classes the first ones.

    Args:
        classes: Their names.
        labels: Class of every image.
        kinds: Format and mode of every image.
        ignored: Numbers of other files by class and ending.
    """
    counts: dict[int, Counter[str]] = {label: Counter() for label in range(len(classes))}
    for label, kind in zip(labels, kinds, strict=True):
        counts[label][kind] += 1
    lines = []
    for label, name in enumerate(classes[:MANY_CLASSES]):
        held = ", ".join(f"{number:,} {kind}" for kind, number in counts[label].most_common()) or "no images"
        others = ", ".join(f"{number:,} {ending}" for (of, ending), number in sorted(ignored.items()) if of == name)
        lines.append(f"class {label} {name[:50]!r}: {held}" + (f"; ignored: {others}" if others else ""))
    if len(classes) > MANY_CLASSES:
        fewest, most = (choose(each.total() for each in counts.values()) for choose in (min, max))
        rest = f"… and {len(classes) - MANY_CLASSES:,} more classes; {fewest:,} to {most:,} images in each"
        lines.append(rest + (f"; {ignored.total():,} other files ignored" if ignored else ""))
    return lines


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
