"""Finds broken image files before training starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, UnidentifiedImageError

from dnw_graph.errors import InputError

# The last bytes of a whole file, by Pillow's name of the format.
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def inspect(path: str) -> tuple[str, str | None]:
    """Return what an image file holds, such as ``"JPEG RGB"``, and what is wrong with it, or None.

    Reads the header and looks at the last bytes. A file that does not end as its format should (cut off, or with
    something appended, or of a format without a known ending) is decoded in full, and that decides.
    """
    kind = "unknown"
    try:
        if not os.path.isfile(path):
            return kind, "not a regular file"
        with open(path, "rb") as file, Image.open(file) as image:
            kind = f"{image.format} {image.mode}"
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
    """Look at every file, several at a time, and return what each holds, such as ``"JPEG RGB"``.

    Args:
        paths: Image files.
        threads: Files looked at in parallel; reading waits for the disk more than for the processor.

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
