"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dnw_graph.errors import InputError


@contextmanager
def whole_file(path: Path, option: str) -> Iterator[Path]:
    """Give a temporary path beside a file, which becomes the file at the end; until then the file stays as it was.

    Args:
        path: The file; the temporary path has its ending.
        option: The command-line option that names another place, for the message.

    Raises:
        InputError: If the file cannot be written, for example because the disk is full.
    """
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): make room, or give another {option}") from error
    finally:
        partial.unlink(missing_ok=True)
