"""Programs that stop, in processes of their own; none of them needs PyTorch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from pairs import rest_is_slow

from dnw_graph import stopping

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
PROGRAM = """
import os, subprocess, sys, threading, time
from pathlib import Path
from dnw_graph import stopping

def ready():
    print(f"{rank} {os.getpid()}\\n", end="", flush=True)  # in one write

def start_ranks(number):
    for rank in range(1, number):
        environ = {**os.environ, "LOCAL_RANK": str(rank), stopping.MAIN_PROCESS: str(os.getpid())}
        stopping.add_rank(subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environ))

rank = int(os.environ.get("LOCAL_RANK", "0"))
stopping.start()
"""


class Program(subprocess.Popen[str]):
    """A program; ``ranks`` are its processes."""

    ranks: dict[int, int]


Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a program and wait until it, and each of its ranks, is ready."""
    started = []

    def begin(program: str, *argv: str, ranks: int = 1) -> Program:
        script = tmp_path / "program.py"
        script.write_text(PROGRAM + program)
        process = Program(
            [sys.executable, str(script), *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        started.append(process)
        assert process.stdout is not None
        process.ranks = dict([tuple(map(int, process.stdout.readline().split())) for _ in range(ranks)])
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process: Program) -> tuple[int, str]:
    """The exit status, and what is on stderr."""
    error = process.communicate(timeout=60)[1]
    return process.returncode, error


BUSY = {
    "asleep": "time.sleep(60)",
    "where Python runs no handlers": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("state", BUSY)
def test_a_program_that_has_saved_nothing_says_so(state: str, number: signal.Signals, start: Start):
    process = start(f"ready(); {BUSY[state]}")
    process.send_signal(number)
    assert ended(process) == (128 + number, "stopped: nothing was saved yet\n")


def test_the_command_that_goes_on_is_that_of_the_program(start: Start):
    program = "stopping.saved(Path('a b/last.ckpt')); ready(); time.sleep(60)"
    start_from = ("--resume", "old", "--init-from", "x", "--init-from=y", "--resume=older")
    process = start(program, *start_from, "--epochs", "3", "--output", "a b")
    process.send_signal(signal.SIGTERM)
    status, error = ended(process)
    assert status == 143
    assert error.startswith(f"stopped: continue with {sys.executable} /")
    assert error.endswith(" --epochs 3 --output 'a b' --resume 'a b/last.ckpt'\n")


def test_a_command_that_goes_on_by_itself_is_given_again(start: Start):
    program = "stopping.goes_on(); stopping.saved(Path('runs/last.ckpt')); ready(); time.sleep(60)"
    process = start(program, "--rules", "dnw")
    process.send_signal(signal.SIGINT)
    status, error = ended(process)
    assert status == 130
    assert error.endswith("program.py --rules dnw\n")


def test_a_signal_that_has_to_wait_does_and_is_announced(start: Start):
    process = start("""
with stopping.watched():
    stopping.defer()
    ready()
    while not stopping.requested():
        time.sleep(0.01)
    time.sleep(stopping.NOTICE_SECONDS + 1)
    stopping.agree(stopping.requested())
    raise stopping.Stopped(stopping.requested())
""")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "stopping at the end of this step\n")


# What a program does that defers signals, and how many it gets.
NOT_ASKED_FOR = {
    "a third signal does not wait": ("while True: time.sleep(60)", 3),
    "one that nobody asked for counts at the end": ("while not stopping.requested(): time.sleep(0.01)", 1),
}


@pytest.mark.parametrize("name", rest_is_slow(reversed(NOT_ASKED_FOR)))
def test_deferred_signals_that_nobody_asks_for(name: str, start: Start):
    work, number = NOT_ASKED_FOR[name]
    process = start(f"""
with stopping.watched():
    stopping.defer()
    ready()
    {work}
print("not reached", flush=True)
""")
    for _ in range(number):
        process.send_signal(signal.SIGTERM)
        time.sleep(2 * stopping.SAME_SECONDS)
    assert ended(process) == (143, "stopped: nothing was saved yet\n")


RANKS = """
if rank == 0:
    start_ranks(3)
with stopping.watched():
    {deferred}
    stopping.saved(Path("run/last.ckpt"))
    ready()
    time.sleep(60)
"""


@pytest.mark.parametrize("deferred", ["", "stopping.defer()"])
@pytest.mark.parametrize("lost", [1, 2])
def test_the_loss_of_a_rank_ends_the_others_with_one_line(lost: int, deferred: str, start: Start):
    process = start(RANKS.format(deferred=deferred), ranks=3)
    os.kill(process.ranks[lost], signal.SIGKILL)
    status, error = ended(process)
    assert status == stopping.FAILED
    assert error.count("\n") == 1
    expected = f"error: rank {lost} (process {process.ranks[lost]}) was killed by SIGKILL: continue with "
    assert error.startswith(expected)
    assert error.endswith(" --resume run/last.ckpt\n")


def test_the_loss_of_the_main_process_ends_the_others_with_one_line(start: Start):
    process = start(RANKS.format(deferred=""), ranks=3)
    process.kill()
    status, error = ended(process)  # at the end of the last one: it reads what all of them write
    assert status == -signal.SIGKILL
    assert error.count("\n") == 1
    assert error.startswith(f"error: rank 0 (process {process.pid}) was killed: continue with ")


@pytest.mark.parametrize("target", ["main", "rank", "group"])
def test_a_signal_before_ranks_work_together_ends_all_with_one_line(target: str, start: Start):
    process = start(RANKS.format(deferred=""), ranks=3)
    if target == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(process.pid if target == "main" else process.ranks[1], signal.SIGTERM)
    status, error = ended(process)
    assert status == 143
    assert error.count("\n") == 1
    assert error.startswith("stopped: continue with ")


def test_an_error_of_a_rank_is_told_once(start: Start):
    program = """
class Slow(subprocess.Popen):
    def kill(self):
        super().kill()
        time.sleep(3 * stopping.LOOK_SECONDS)  # ranks that an error ends are not lost, however late it goes on

if rank == 0:
    subprocess.Popen = Slow
    start_ranks(3)
ready()
try:
    with stopping.watched():
        if rank == 2:
            raise ValueError("mine")
        time.sleep(1)
        raise ValueError("connection closed by peer")
except ValueError as error:
    print(rank, error, file=sys.stderr, flush=True)
    sys.exit(2)
"""
    assert ended(start(program, ranks=3)) == (2, "0 connection closed by peer\n")


def test_a_library_leaves_signals_as_they_were():
    handlers = [signal.getsignal(number) for number in stopping.SIGNALS]
    threads = threading.active_count()

    def work() -> None:
        with stopping.watched():
            stopping.defer()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping.requested() == signal.SIGTERM

    with pytest.raises(stopping.Stopped) as stopped:
        work()
    assert stopped.value.code == 143
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_before_a_held_process_is_ready_for_it_ends_it_in_one_line(number: signal.Signals):
    program = "from dnw_graph import stopping; stopping.start(); import time; time.sleep(60)"
    with stopping.held():
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "stopped: nothing was saved yet\n"
    assert process.returncode == 128 + number
