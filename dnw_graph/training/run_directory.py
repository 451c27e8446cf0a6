"""The directory of a run: found, created, and locked against other runs."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dnw_graph.errors import InputError
from dnw_graph.recipes.options import RunOptions
from dnw_graph.stopping import DIRECTORY, is_first_process
from dnw_graph.whole_file import make_writable

if sys.platform != "win32":  # which has no such locks
    import fcntl


@contextmanager
def run_directory(options: RunOptions) -> Iterator[Path]:
    """Provide the directory of a run, created if necessary; no other run can use it until the end.

    The first process of the run creates and locks it. The lock ends with the process, in whatever way it ends.

    Raises:
        InputError: If it cannot be written to, is in use, or holds another run.
    """
    if not is_first_process():
        yield Path(options.output or os.environ.get(DIRECTORY) or "runs")
        return
    directory = _made(options)
    make_writable(directory, "--output")
    with open(directory / ".lock", "a+") as lock:
        _take(lock, directory)
        last = directory / "last.ckpt"
        home = Path(options.resume).resolve().parent if options.resume else None
        if last.exists() and directory.resolve() != home and not options.evaluate:
            raise InputError(
                f"{directory} already holds a run: continue it with --resume {last}, or give another --output"
            )
        yield directory


def _made(options: RunOptions) -> Path:
    if options.output is not None or options.resume is not None:
        return Path(options.output) if options.output is not None else Path(str(options.resume)).parent
    runs = Path("runs")
    make_writable(runs, "--output")
    for number in itertools.count(1):
        directory = runs / str(number)
        try:
            directory.mkdir()
        except FileExistsError:  # also by a run that starts at the same time
            continue
        break
    return directory


def _take(lock: TextIO, directory: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        # Not flock: data-loading processes would inherit its locks and hold them for seconds longer.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.seek(0)
        raise InputError(
            f"another run ({lock.read() or 'of unknown process'}) uses {directory}: wait for its end, or give another "
            "--output"
        ) from error
    except OSError:  # a file system without locks
        return
    lock.truncate(0)
    lock.write(f"process {os.getpid()}")
    lock.flush()
