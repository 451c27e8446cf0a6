"""The folder of a run: found, made, and locked against other runs."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dnw_graph.errors import InputError
from dnw_graph.stopping import FOLDER, is_first_process
from dnw_graph.training.options import RunOptions
from dnw_graph.whole_file import make_writable

if sys.platform != "win32":  # which has no such locks
    import fcntl


@contextmanager
def run_folder(options: RunOptions) -> Iterator[Path]:
    """Give the folder of a run, made if needed; no other run can use it until the end.

    The first process of the run makes and locks it. The lock ends with the process, however that ends.

    Raises:
        InputError: If it cannot be written to, is in use, or holds another run that is not resumed.
    """
    if not is_first_process():
        yield Path(os.environ.get(FOLDER) or options.output or "runs")
        return
    folder = _made(options)
    make_writable(folder, "--output")
    with open(folder / ".lock", "a+") as lock:
        _take(lock, folder)
        last = folder / "last.ckpt"
        if last.exists() and not (options.resume or options.evaluate):
            raise InputError(
                f"{folder} already holds a run: continue it with --resume {last}, or give another --output"
            )
        yield folder


def _made(options: RunOptions) -> Path:
    if options.output is not None or options.resume is not None:
        return Path(options.output) if options.output is not None else Path(str(options.resume)).parent
    runs = Path("runs")
    make_writable(runs, "--output")
    for number in itertools.count(1):
        folder = runs / str(number)
        try:
            folder.mkdir()
        except FileExistsError:  # also by a run that starts at the same time
            continue
        break
    return folder


def _take(lock: TextIO, folder: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        # Not flock, whose locks the processes that load images would inherit and hold for seconds longer.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.seek(0)
        raise InputError(
            f"another run ({lock.read() or 'of unknown process'}) uses {folder}: wait for its end, or give another "
            "--output"
        ) from error
    except OSError:  # a file system without locks
        return
    lock.truncate(0)
    lock.write(f"process {os.getpid()}")
    lock.flush()


def file_names(names: Iterable[str]) -> list[str]:
    """Return names for files, all different, also where letters of either case are one."""
    found: list[str] = []
    for name in names:
        stem = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:200]
        numbered = (stem, *(f"{stem}-{number}" for number in range(2, len(found) + 2)))
        taken = {each.lower() for each in found}
        found.append(next(each for each in numbered if each.lower() not in taken))
    return found
