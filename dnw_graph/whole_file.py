"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dnw_graph.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
# What file systems say that cannot flush a directory.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def write_whole(path: Path, content: bytes | memoryview, option: str) -> None:
    """Write a file whole or not at all, so that it survives a crash of the process or of the machine.

    The content goes to ``<name>.partial`` beside the file, onto the disk, and takes the file's name. A process that is
    killed leaves at most that partial file, which the next write overwrites.

    Args:
        path: The file.
        content: All of it.
        option: What names another place, such as a command-line option, for the message.

    Raises:
        InputError: If the file cannot be written, for example because the disk is full. It stays as it was.
    """
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_directory(path.parent)
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise unwritable(path, error, option) from error
    finally:
        with suppress(OSError, ValueError):  # such as a file system that has become read-only
            partial.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError | ValueError, option: str) -> InputError:
    """Return the error for a file that cannot be written."""
    room = "make room, or " if isinstance(error, OSError) and error.errno in FULL else ""
    return InputError(f"cannot write {path} ({_cause(error)}): {room}give another {option}")


def make_writable(directory: Path, option: str) -> None:
    """Make a directory if needed, and see that files can be made in it.

    Args:
        directory: The directory.
        option: What names another place, as in :func:`write_whole`.

    Raises:
        InputError: If not.
    """
    probe = directory / ".writable"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot write to directory {directory} ({_cause(error)}): give another one with {option}"
        ) from error


def _cause(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _sync_directory(directory: Path) -> None:
    """Have the new name of a file reach the disk."""
    if os.name == "nt":  # directories cannot be opened
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
