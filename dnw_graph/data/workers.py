"""Data-loading processes, which are stopped by their parent."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dnw_graph import stopping
from dnw_graph.errors import InputError

# CPython before 3.11.10 hangs in a forked process for good if, at that moment, another thread creates its thread state
# (gh-112275), as those of a process group do at the end of a collective operation.
FORKS_CAN_HANG = sys.version_info < (3, 11, 10)
SETTLING_SECONDS = 0.05  # From a collective operation to a fork: those threads take far less to come to rest.


class Loader(DataLoader[tuple[Tensor, int]]):
    """A loader whose workers are stopped only by their parent.

    Ctrl-C, and often SIGTERM, reach the whole process group. If they ended a worker, the step in progress, which must
    be finished and saved, would fail.
    """

    def __init__(self, samples: Dataset[tuple[Tensor, int]], **options: Any) -> None:
        super().__init__(samples, worker_init_fn=leave_the_group, **options)

    def __iter__(self) -> Any:
        if not self.num_workers:
            return super().__iter__()
        if FORKS_CAN_HANG and dist.is_available() and dist.is_initialized():
            time.sleep(SETTLING_SECONDS)
        with stopping.held():
            return super().__iter__()


def leave_the_group(worker: int) -> None:
    """Make a worker end only when its parent says so, not on a signal to the group."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)  # The parent's, which would take this worker's signals for its own.
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # drops earlier signals
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # the parent's
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
    sys.excepthook = _except_losses


def _except_losses(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print no traceback if the parent is lost during an exchange; PyTorch then ends the worker."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


@contextmanager
def lost_workers_told() -> Iterator[None]:
    """Report in one line that a worker was killed; PyTorch would print a traceback."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise InputError(
            "a data-loading process was killed, as happens when memory runs out: give fewer --workers; "
            f"{stopping.how_to_continue()}"
        ) from error
