"""Ends the processes of a run: on Ctrl-C, on SIGTERM, or because one of them is lost.

A program calls :func:`start` before slow imports, so this module uses the standard library only.

A thread handles the signals. The main thread may be in an import or a collective operation, where Python runs no signal
handlers; and an exception from a handler can surface anywhere.
"""

from __future__ import annotations

import atexit
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FAILED = 1
# Options that define where a run starts; to continue, its newest checkpoint replaces them.
STARTS = ("--resume", "--init-from")
# Set for the ranks that a main process starts: its process id, and the directory of the run.
MAIN_PROCESS, DIRECTORY = "DNW_GRAPH_MAIN_PROCESS", "DNW_GRAPH_DIRECTORY"
# Environment variables that are 0 or not set in the first process of a run.
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")

LOOK_SECONDS = 0.2  # Interval of checks of the other processes.
LOSS_SECONDS = 2.0  # Time until the loss of another process becomes visible.
NOTICE_SECONDS = 3.0  # Delay of the notice that a stop waits for the end of a step.
ENDING_SECONDS = 10.0  # Time for the other ranks to end on their own.
# The third signal does not wait for the end of a step. Simultaneous signals, such as those of `timeout`, count as one.
PATIENCE, SAME_SECONDS = 3, 0.5


class Stopped(SystemExit):
    """Ends a run after Ctrl-C or SIGTERM; ``code`` is 128 + the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def is_first_process() -> bool:
    """Return whether this process writes the files and messages of its run."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def say(text: str) -> None:
    """Print a line to stderr, below the progress bar."""
    with suppress(OSError, ValueError):  # The stream may be closed.
        if sys.stdout.isatty():
            print(flush=True)
        print(text, file=sys.stderr, flush=True)


class _Process:
    """The state of this process in its run, and its watching thread."""

    def __init__(self) -> None:
        self.command: tuple[list[str], list[str]] | None = None
        self.checkpoint: Path | None = None
        self.goes_on = False  # Whether repeating the same command continues the run.
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.main = int(os.environ.get(MAIN_PROCESS, "0"))
        self.together = bool(self.main)  # Whether the loss of another process ends this one.
        self.deferring = False  # Whether signals wait until requested.
        self.number = self.agreed = 0  # The waiting signal, and the one for which all ranks stop.
        self.signals, self.times, self.announced = 0, (0.0, 0.0), False
        self.lock = threading.Lock()
        self.watching = False
        self.handlers: dict[signal.Signals, Any] = {}

    def watch(self) -> None:
        """Start the thread."""
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.writer.setblocking(False)
        self.watching = True
        self.thread = threading.Thread(target=self._watch, name="dnw_graph.stopping", daemon=True)
        self.thread.start()

    def watch_no_more(self) -> None:
        """End the thread."""
        self.watching = False
        self.writer.send(b"\0")
        self.thread.join()
        self.reader.close()
        self.writer.close()

    def _watch(self) -> None:
        while self.watching:
            select.select([self.reader], [], [], LOOK_SECONDS)
            with self.lock:
                self._read_signals()
                if self.together:
                    self._look_at_others()
                if self.deferring and self.number and not (self.agreed or self.announced):
                    self._announce()

    def take_signals(self) -> None:
        """Route signals to the thread and :attr:`number` instead of the previous handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        self.wakeup = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)

    def give_signals_back(self) -> None:
        """Undo :meth:`take_signals`."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.handlers:
            signal.set_wakeup_fd(self.wakeup)
        self.handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    def _read_signals(self) -> None:
        """Read the numbers of signals that have arrived."""
        try:
            numbers = self.reader.recv(1024)
        except BlockingIOError:
            return
        for number in numbers:
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            first, last = self.times
            self.number = self.number or number
            self.signals += now - last > SAME_SECONDS
            self.times = first or now, now
            if not self.deferring or self.signals >= PATIENCE:
                self._stop_at_once(number)

    def _stop_at_once(self, number: int) -> None:
        if self.agreed:
            self._end(128 + self.agreed)
        self._end(128 + number, f"stopped: {how_to_continue()}" if is_first_process() else "")

    def _announce(self) -> None:
        if time.monotonic() - self.times[0] > NOTICE_SECONDS:
            self.announced = True
            if is_first_process():
                say("stopping at the end of this step")

    def _look_at_others(self) -> None:
        for rank, process in enumerate(self.ranks, 1):
            status = process.poll()
            if not status or (self.agreed and status == 128 + self.agreed):
                continue
            number = -status if status < 0 else status - 128
            if number in SIGNALS:
                self._stop_at_once(number)
            if status > 0:
                self._end(status)  # The rank has printed its error.
            name = signal.Signals(number).name
            self._end(FAILED, f"error: rank {rank} (process {process.pid}) was killed by {name}: {how_to_continue()}")
        if self.main and os.getppid() != self.main:
            if self.agreed:
                self._end(128 + self.agreed)
            lost = f"error: rank 0 (process {self.main}) was killed: {how_to_continue()}"
            self._end(FAILED, lost if os.environ.get("LOCAL_RANK") == "1" else "")

    def _end(self, status: int, text: str = "") -> None:
        """End this process and those that it started."""
        if text:
            say(text)
        for rank in self.ranks:
            rank.kill()
        for worker in active_children():
            worker.kill()
        os._exit(status)

    def end_deferral(self) -> int:
        """Let signals act at once again, and return one that is still waiting, or 0."""
        with self.lock:
            if not self.deferring:
                return 0
            self._read_signals()
            number = 0 if self.agreed else self.number
            self.deferring = False
            if self.command is None:
                self.give_signals_back()
        return number


_this = _Process()


def start() -> None:
    """From now on, let Ctrl-C and SIGTERM end this program with one line and status 130 or 143."""
    _this.command = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1], sys.argv[1:]
    with held():
        _this.watch()
        _this.take_signals()
    _let_through()
    # The function registered first is called last: nothing can change the status afterwards.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in SIGNALS])


@contextmanager
def held() -> Iterator[None]:
    """Block signals in this thread, and in processes that it starts until they can handle them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _let_through() -> None:
    """Unblock the signals that were blocked while this process was started."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def saved(checkpoint: Path | None) -> None:
    """Note the newest checkpoint of the run, or that there is none yet."""
    _this.checkpoint = checkpoint


def how_to_continue() -> str:
    """Return how to continue from the newest checkpoint: with a command, if :func:`start` was called."""
    if _this.checkpoint is None:
        return "nothing was saved yet"
    words = ["--resume", str(_this.checkpoint)]
    if _this.command is not None:
        program, options = _this.command
        words = [*program, *options] if _this.goes_on else [*program, *without_start(options), *words]
    return f"continue with {shlex.join(words)}"


def goes_on() -> None:
    """Note that repeating the same command continues the run."""
    _this.goes_on = True


def without_start(options: Sequence[str]) -> list[str]:
    """Return the options without those that define where a run starts."""
    kept = []
    values = iter(options)
    for word in values:
        if word in STARTS:
            next(values, None)
        elif not word.startswith(tuple(f"{name}=" for name in STARTS)):
            kept.append(word)
    return kept


def add_rank(process: subprocess.Popen[bytes]) -> None:
    """Watch a rank that this process has started."""
    _this.ranks.append(process)


@contextmanager
def watched() -> Iterator[None]:
    """Watch the ranks of a run while they work together.

    If a rank is lost, which also causes exceptions in its peers, this process ends with one line. An exception in this
    process ends the ranks that it started.
    """
    own = not _this.watching
    if own:
        _this.watch()
        _let_through()
    _this.together = True
    try:
        yield
    except Stopped:
        raise
    except BaseException:
        if _this.ranks or _this.main:
            # The main process, which may have raised the exception itself, goes first.
            time.sleep(LOSS_SECONDS * (2 if _this.main else 1))
        with _this.lock:  # the thread must not mistake the ranks ended here for lost ones
            _this.together = False
        for rank in _this.ranks:
            rank.kill()
        raise
    finally:
        _this.together = False
        number = _this.end_deferral()
        if own:
            _this.watch_no_more()
    if number:
        if is_first_process():
            say(f"stopped: {how_to_continue()}")
        raise Stopped(number)


def defer() -> None:
    """Until the end of :func:`watched`, let signals wait until requested."""
    if not _this.watching:
        return
    with _this.lock:
        _this.number = _this.agreed = _this.signals = 0
        _this.times, _this.announced = (0.0, 0.0), False
        _this.deferring = True
    if _this.command is None:
        _this.take_signals()


def requested() -> int:
    """Return the number of the waiting signal, or 0."""
    return _this.number


def agree(number: int) -> None:
    """Note that all ranks stop now, because of a signal."""
    _this.agreed = number


@atexit.register
def _wait_for_ranks() -> None:
    deadline = time.monotonic() + ENDING_SECONDS
    for rank in _this.ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
