"""Kills and signals at random moments of real runs: which ended, or left behind, what they must not.

The quick form runs in the slow tests (``test_kills.py``). The long form, by hand:

    python tests/robust/kills.py --kills 40 --devices 1 2

Every case starts a run, sends Ctrl-C, SIGTERM or SIGKILL to its main process, to another rank or to the whole
group, once or twice, while it imports, starts or trains, and then goes on with the command that it printed. A case is
bad if the exit status is wrong, stderr has anything but one line, a process is left after 10 seconds, or the run that
goes on does not end, or ends with other bits than an unbroken one. Needs Linux (``/proc``).
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

PACKAGES = Path(find_spec("dnw_graph").origin).parents[1]
EXAMPLE = Path(__file__).with_name("light_example.py")
OPTIONS = ["--epochs", "6", "--batch-size", "128", "--save-every", "3", "--output", "run"]
KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
MOMENTS = ("import", "start", "training")
NOTICE = "stopping at the end of this step"
GONE_SECONDS = 10
PATIENCE_SECONDS = 180
STACKS = signal.SIGUSR1  # makes every process of the example print the stacks of its threads


@dataclass
class Case:
    kind: signal.Signals
    devices: int
    workers: int
    target: str  # main, rank or group
    times: int
    moment: str
    epochs: int  # done when it is killed, if it trains
    delay: float
    example: Path = EXAMPLE
    reasons: list[str] = field(default_factory=list)
    seconds: float | None = None  # from the loss of a process to the end of the last one

    def __str__(self) -> str:
        times = " twice" if self.times == 2 else ""
        return (
            f"{self.kind.name}{times} to {self.target}, {self.devices} devices, {self.workers} workers, "
            f"{self.moment} ({self.epochs}) + {self.delay:.2f} s"
        )


def draw(rng: random.Random, devices: int, kind: signal.Signals) -> Case:
    targets = ["main"] if devices == 1 else ["main", "rank"]
    if kind != signal.SIGKILL:
        targets.append("group")
    moment = rng.choice(MOMENTS)
    return Case(
        kind=kind,
        devices=devices,
        workers=rng.choice([0, 2]),
        target=rng.choice(targets),
        times=1 if kind == signal.SIGKILL else rng.choice([1, 2]),
        moment=moment,
        epochs=rng.randrange(4) if moment == "training" else 0,
        delay=rng.uniform(0, 3.5) if moment == "import" else rng.uniform(0, 0.5),
    )


def command(case: Case) -> list[str]:
    return [sys.executable, str(case.example), *OPTIONS, "--devices", str(case.devices), "--workers", str(case.workers)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGES)}


def ranks(main: int) -> list[int]:
    """Return the processes that a main process has started for other devices."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == main and b"\0LOCAL_RANK=" in b"\0" + (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError):  # has just ended
            continue
    return found


def alive(session: int) -> list[int]:
    """Return the processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def handles_signals(process: int) -> bool:
    """Return whether a process handles SIGTERM, which Python leaves to the system."""
    status = Path(f"/proc/{process}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def begin(case: Case, folder: Path) -> subprocess.Popen[bytes]:
    """Start the run of a case and return at its moment."""
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        main = subprocess.Popen(
            command(case), stdout=out, stderr=err, cwd=folder, env=environment(), start_new_session=True
        )
    run = folder / "run"

    def time_has_come() -> bool:
        if case.moment == "import":
            return handles_signals(main.pid)
        if case.moment == "start":
            return run.exists()
        rows = run / "metrics.csv"
        return (run / "last.ckpt").exists() and rows.exists() and len(rows.read_text().splitlines()) > 3 * case.epochs

    wait_for(lambda: time_has_come() or main.poll() is not None, PATIENCE_SECONDS)
    if case.target == "rank":
        wait_for(lambda: ranks(main.pid) or main.poll() is not None, PATIENCE_SECONDS)
    time.sleep(case.delay)
    return main


def send(case: Case, main: subprocess.Popen[bytes], rng: random.Random) -> None:
    for number in range(case.times):
        if number:
            time.sleep(rng.uniform(0.05, 0.8))
        try:
            if case.target == "group":
                os.killpg(main.pid, case.kind)
            else:
                os.kill(main.pid if case.target == "main" else ranks(main.pid)[0], case.kind)
        except (ProcessLookupError, IndexError):
            return


def attack(case: Case, folder: Path, rng: random.Random) -> bool:
    """Do a case up to the end of its processes, and note what is wrong; return False if the run ended too early."""
    main = begin(case, folder)
    if main.poll() is not None:
        return False
    others = bool(ranks(main.pid))
    begun = time.monotonic()
    send(case, main, rng)
    seconds = GONE_SECONDS if case.kind == signal.SIGKILL else PATIENCE_SECONDS
    try:
        status = main.wait(seconds)
    except subprocess.TimeoutExpired:
        case.reasons.append(f"the main process is there after {seconds} s")
    else:
        expected = 128 + case.kind if case.kind != signal.SIGKILL else -9 if case.target == "main" else 1
        if status != expected:
            case.reasons.append(f"status {status}")
    if not wait_for(lambda: not alive(main.pid), GONE_SECONDS):
        case.reasons.append("processes are left after 10 s")
    case.seconds = time.monotonic() - begun
    for process in alive(main.pid):
        os.kill(process, signal.SIGKILL)
    main.wait()
    lines = [line for line in (folder / "err").read_text().splitlines() if line.strip() and line != NOTICE]
    if any("Traceback" in line for line in lines):
        case.reasons.append(f"a traceback ending in {lines[-1]}")
    elif len(lines) != (others if case.kind == signal.SIGKILL and case.target == "main" else 1):
        case.reasons.append(f"{len(lines)} lines on stderr")
    return True


def go_on(case: Case, folder: Path) -> None:
    """Go on as the run has said, or from what a killed one has left, and compare with an unbroken run."""
    from dnw_graph.training import read_checkpoint

    text = (folder / "err").read_text()
    _, found, rest = text.partition("continue with ")
    last = folder / "run" / "last.ckpt"
    words = shlex.split(rest.splitlines()[0]) if found else []
    if not found:
        if case.kind != signal.SIGKILL and (case.moment == "training" or "nothing was saved" not in text):
            case.reasons.append("no command to go on")
        if not last.exists():
            return
        words = ["--resume", "run/last.ckpt"]
    if words[0].startswith("--"):
        if found:
            case.reasons.append("a command that is none")
        words = [*command(case), *words]
    step = text.partition("stopped after step ")[2].partition(":")[0]
    if step and read_checkpoint(last)["global_step"] != int(step):
        case.reasons.append("last.ckpt is of another step")
    status = run_to_the_end(words, folder)
    if status is None:
        case.reasons.append(f"resuming does not end within {PATIENCE_SECONDS} s")
    elif status:
        case.reasons.append(f"resuming ends with status {status}")
    else:
        case.reasons += differences(folder / "run", reference(case))


def run_to_the_end(words: list[str], folder: Path) -> int | None:
    """Return the status of a run; None, after printing what each of its processes does, if one does not end in time."""
    log = folder / "log"
    with open(log, "wb") as out:
        main = subprocess.Popen(words, stdout=out, stderr=out, cwd=folder, env=environment(), start_new_session=True)
    if wait_for(lambda: main.poll() is not None and not alive(main.pid), PATIENCE_SECONDS):
        return main.returncode
    left = alive(main.pid)
    for process in left:
        with suppress(ProcessLookupError):
            os.kill(process, STACKS)
        time.sleep(1)  # Else their lines mix.
    print(f"main process {main.pid}, status {main.poll()}, processes {left}:\n{log.read_text()}")
    for process in alive(main.pid):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    main.wait()
    return None


_references: dict[int, tempfile.TemporaryDirectory[str]] = {}


def reference(case: Case) -> Path:
    """Return the folder of an unbroken run."""
    if case.devices not in _references:
        folder = _references[case.devices] = tempfile.TemporaryDirectory()
        assert run_to_the_end(command(case), Path(folder.name)) == 0, "an unbroken run fails"
    return Path(_references[case.devices].name, "run")


def differences(run: Path, unbroken: Path) -> list[str]:
    import torch

    from dnw_graph.training import read_checkpoint

    found = []
    one, other = (read_checkpoint(folder / "last.ckpt") for folder in (run, unbroken))
    moments = [[s["momentum_buffer"] for s in c["optimizer_states"][0]["state"].values()] for c in (one, other)]
    same = all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    if not same or not all(torch.equal(a, b) for a, b in zip(*moments, strict=True)):
        found.append("other bits than an unbroken run")
    if (run / "metrics.csv").read_text() != (unbroken / "metrics.csv").read_text():
        found.append("another metrics.csv than an unbroken run")
    return found


def try_case(case: Case, rng: random.Random) -> bool:
    """Do a case, and note what is wrong; return False if the run ended before it was killed."""
    with tempfile.TemporaryDirectory() as name:
        if not attack(case, Path(name), rng):
            return False
        go_on(case, Path(name))
    return True


def main() -> int:
    """Print tried and bad of every kind, and the bad ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="cases for each number of devices")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--example", type=Path, default=EXAMPLE, help="another program with the same options")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, and by children then
    total = 0
    for devices in options.devices:
        rng = random.Random(f"{devices} {options.seed}")
        cases = []
        while len(cases) < options.kills:
            case = draw(rng, devices, KINDS[len(cases) % len(KINDS)])
            case.example = options.example.resolve()
            if not try_case(case, rng):
                continue
            cases.append(case)
            print(f"{'bad ' if case.reasons else 'good'} {case}: {'; '.join(case.reasons)}", flush=True)
        for kind in KINDS:
            of_kind = [case for case in cases if case.kind == kind]
            bad = [case for case in of_kind if case.reasons]
            total += len(bad)
            reasons = Counter(reason for case in bad for reason in case.reasons)
            print(f"{devices} devices, {kind.name}: {len(of_kind)} tried, {len(bad)} bad {dict(reasons) or ''}")
        lost = [case.seconds for case in cases if case.kind == signal.SIGKILL and case.seconds is not None]
        if lost:
            median = statistics.median(lost)
            print(
                f"{devices} devices, from SIGKILL to the last process's end: {median:.1f} s, at most {max(lost):.1f} s"
            )
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
