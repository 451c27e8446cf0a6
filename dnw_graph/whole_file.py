"""Writes files atomically."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dnw_graph.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
# Errors of file systems that cannot flush a directory.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def write_whole(path: Path, content: bytes | memoryview, option: str) -> None:
    """Write a file atomically, so that it survives a crash of the process or of the machine.

    The content is written to ``<name>.partial``, flushed to disk and renamed. A killed process leaves at most that
    partial file, which the next write overwrites. A link stays, and its target is replaced; a file keeps its mode.

    Args:
        path: The file.
        content: The content of the file.
        option: The argument or command-line option for another path, for messages.

    Raises:
        InputError: If the file cannot be written, for example because the disk is full. An existing file is unchanged.
    """
    partial = Path(f"{path}.partial")
    try:
        target = Path(os.path.realpath(path))
        partial = Path(f"{target}.partial")
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):  # There is no file yet, or the file system has no modes.
            shutil.copymode(target, partial)
        os.replace(partial, target)
        _sync_directory(target.parent)
    except (OSError, ValueError) as error:  # ValueError for a null character.
        raise unwritable(path, error, option) from error
    finally:
        with suppress(OSError, ValueError):  # The file system may have become read-only.
            partial.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError | ValueError, option: str) -> InputError:
    """Return the error for a file that cannot be written."""
    room = "make room, or " if isinstance(error, OSError) and error.errno in FULL else ""
    return InputError(f"cannot write {path} ({_cause(error)}): {room}give another {option}")


def make_writable(directory: Path, option: str) -> None:
    """Create a directory if necessary, and make sure that files can be created in it.

    Args:
        directory: The directory.
        option: As for :func:`write_whole`.

    Raises:
        InputError: If that is impossible.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot write to directory {directory} ({_cause(error)}): give another one with {option}"
        ) from error


def _cause(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _sync_directory(directory: Path) -> None:
    """Flush a directory to disk, with the new name of a file."""
    if os.name == "nt":  # Windows cannot open directories.
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def file_names(names: Iterable[str]) -> list[str]:
    """Return names for files, all different, also where letters of either case are one."""
    found: list[str] = []
    for name in names:
        stem = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:200]
        numbered = (stem, *(f"{stem}-{number}" for number in range(2, len(found) + 2)))
        taken = {each.lower() for each in found}
        found.append(next(each for each in numbered if each.lower() not in taken))
    return found
