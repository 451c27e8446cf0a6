"""Finds broken image files before training starts, and summarises each class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from PIL import Image, UnidentifiedImageError

from dnw_graph.data.images import FileImages, Images
from dnw_graph.errors import InputError
from dnw_graph.preprocessing import UNSUPPORTED
from dnw_graph.stopping import is_first_process

# From this many images, checking takes seconds and is announced.
MANY_IMAGES = 20_000
# Classes that are listed.
MANY_CLASSES = 50
# The last bytes of a complete file, by Pillow's name of the format.
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def inspect(path: str) -> tuple[str, str | None]:
    """Return the content of an image file, such as ``"JPEG RGB"``, and its defect, or None.

    Reads the header and the last bytes. A file that does not end as its format should (truncated, with appended data,
    or of a format without a known end) is decoded in full, which decides.
    """
    kind = "unknown"
    try:
        if not os.path.isfile(path):
            return kind, "not a regular file"
        with open(path, "rb") as file, Image.open(file) as image:
            kind = f"{image.format} {image.mode}"
            if image.mode in UNSUPPORTED:
                return kind, "pixels without a known range"
            ending = ENDINGS.get(image.format or "")
            if ending:
                position = file.tell()
                file.seek(-len(ending), os.SEEK_END)
                if file.read() == ending:
                    return kind, None
                file.seek(position)
            image.load()
    except UnidentifiedImageError:
        return kind, "not an image"
    except Exception as error:  # a damaged file can fail anywhere in the decoder
        return kind, str(error) or type(error).__name__
    return kind, None


def check_images(paths: Sequence[str], threads: int = 16) -> list[str]:
    """Check every file, several in parallel, and return the content of each, such as ``"JPEG RGB"``.

    Args:
        paths: Image files.
        threads: Files checked in parallel; reading waits for the disk more than for the processor.

    Raises:
        InputError: If any file is broken; the message names the first ones.
    """
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(inspect, paths))
    broken = [(path, fault) for path, (_, fault) in zip(paths, found, strict=True) if fault is not None]
    if broken:
        shown = "; ".join(f"{path} ({fault})" for path, fault in broken[:3])
        raise InputError(
            f"{len(broken)} of {len(paths)} image files cannot be read: {shown}{'; ...' if len(broken) > 3 else ''}. "
            "Replace or remove them"
        )
    return [kind for kind, _ in found]


def check_files(classes: Sequence[str], **parts: Images | None) -> None:
    """Check all image files and print the content of each class, in the first process of a run.

    Args:
        classes: Names of the classes.
        parts: The images by purpose.

    Raises:
        InputError: If any file is broken.
    """
    files = {use.replace("_", " "): part for use, part in parts.items() if isinstance(part, FileImages)}
    if not files or not is_first_process():
        return
    paths = [path for part in files.values() for path in part.paths]
    if len(paths) >= MANY_IMAGES:
        print(f"checking {len(paths):,} image files (--no-check-images skips this)", flush=True)
    kinds = check_images(paths)
    labels = {use: [int(label) for label in part.labels] for use, part in files.items()}
    ignored = {id(part.ignored): part.ignored for part in files.values()}  # shared by parts of the same images
    for line in class_lines(classes, labels, kinds, sum(ignored.values(), Counter())):
        print(line, flush=True)


def class_lines(
    classes: Sequence[str],
    labels: Mapping[str, Sequence[int]],
    kinds: Sequence[str],
    ignored: Counter[tuple[str, str]],
) -> list[str]:
    """Return a line per class: images, formats and modes, and other files; with many classes only the first ones.

    Args:
        classes: Their names.
        labels: Class of every image, by purpose of the images.
        kinds: Format and mode of every image.
        ignored: Numbers of other files by class and suffix.
    """
    counts: dict[int, Counter[str]] = {label: Counter() for label in range(len(classes))}
    for label, kind in zip(chain(*labels.values()), kinds, strict=True):
        counts[label][kind] += 1
    uses = {use: Counter(part) for use, part in labels.items()}
    lines = []
    for label, name in enumerate(classes[:MANY_CLASSES]):
        formats = ", ".join(f"{number:,} {kind}" for kind, number in counts[label].most_common()) or "no images"
        held = " + ".join(f"{number[label]:,} {use}" for use, number in uses.items()) + f": {formats}"
        others = ", ".join(f"{number:,} {ending}" for (of, ending), number in sorted(ignored.items()) if of == name)
        lines.append(f"class {label} {name[:50]!r}: {held}" + (f"; ignored: {others}" if others else ""))
    if len(classes) > MANY_CLASSES:
        fewest, most = (choose(each.total() for each in counts.values()) for choose in (min, max))
        rest = f"… and {len(classes) - MANY_CLASSES:,} more classes; {fewest:,} to {most:,} images in each"
        lines.append(rest + (f"; {ignored.total():,} other files ignored" if ignored else ""))
    return lines
