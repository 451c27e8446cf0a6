"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from dnw_graph.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
# What file systems say that cannot flush a folder.
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
        _sync_folder(path.parent)
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise unwritable(path, error, option) from error
    finally:
        with suppress(OSError, ValueError):  # such as a file system that has become read-only
            partial.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError | ValueError, option: str) -> InputError:
    """Return the error for a file that cannot be written."""
    room = "make room, or " if isinstance(error, OSError) and error.errno in FULL else ""
    return InputError(f"cannot write {path} ({_cause(error)}): {room}give another {option}")


def make_writable(folder: Path, option: str) -> None:
    """Make a folder if needed, and see that files can be made in it.

    Args:
        folder: The folder.
        option: What names another place, as in :func:`write_whole`.

    Raises:
        InputError: If not.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot write to folder {folder} ({_cause(error)}): give another one with {option}"
        ) from error


def _cause(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _sync_folder(folder: Path) -> None:
    """Have the new name of a file reach the disk."""
    if os.name == "nt":  # folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)
