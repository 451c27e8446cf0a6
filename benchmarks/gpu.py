"""All GPU measurements, in slices of a few minutes: each call does what remains, in this order.

The tests that need a GPU; training steps compared with the reference formulation and the roofline (float32, bfloat16,
compiled, as CUDA graphs); inference; then the rows of the paper's Tables 1, 2 and 6 on CIFAR-10 that have no record of
these images in benchmarks/results. A call ends within its minutes: the next call restarts an unfinished measurement,
and resumes a training run from its last checkpoint. Run ``make gpu``, or ``python benchmarks/gpu.py --minutes 9
--data DIRECTORY --data-name cifar10``, repeatedly until nothing is left; every call prints the results so far, and
writes them to gpu.md and gpu.json in the results directory. With ``--dry-run`` everything runs on a CPU with tiny
sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import table_lines

from dnw_graph.whole_file import write_whole

ROOT = Path(__file__).resolve().parents[1]
LAST_WORDS = 30.0  # Seconds that a training run has for its last checkpoint.
TABLES = ("table1", "table2", "table6")


@dataclass(frozen=True)
class Task:
    """One measurement or training run.

    Attributes:
        name: Its name.
        command: The arguments of the interpreter.
        result: The file that exists once it is done.
        log: The file for its output.
    """

    name: str
    command: Sequence[str]
    result: Path
    log: Path

    @property
    def done(self) -> bool:
        """Whether it is done."""
        return self.result.exists()

    def run(self, seconds: float) -> str:
        """Run for at most this many seconds; return ``done``, ``stopped`` or ``failed``."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            command = [sys.executable, *self.command]
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
            try:
                process.wait(max(seconds - LAST_WORDS, 1))
            except subprocess.TimeoutExpired:
                _end(process)
                return "done" if self.done else "stopped"
            except KeyboardInterrupt:
                _end(process)
                raise
        if process.returncode:
            self.result.unlink(missing_ok=True)  # Failed tests are told there too.
        return "done" if self.done else "failed"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, after some time for the last checkpoint."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP like Ctrl-C: tasks have sessions of their own, and would run on."""
    every = signal.SIGTERM, signal.SIGHUP
    signals = [number for number in every if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
    before = [signal.signal(number, signal.default_int_handler) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def tasks(output: Path, data: str, data_name: str, dry_run: bool) -> Iterator[Task]:
    """Yield all tasks, the most important first.

    Args:
        output: Directory of all results.
        data: Images for the training runs.
        data_name: Their content.
        dry_run: On a CPU, with tiny sizes.
    """
    output = output.resolve()

    def task(name: str, *command: str, result: Path | None = None) -> Task:
        result = result or output / f"{name}.json"
        own = [str(result) if word == "RESULT" else word for word in command]
        return Task(name, own, result, output / f"{name}.log")

    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    tests = "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files, "--junit-xml", "RESULT"
    yield task("tests", *tests, result=output / "tests.xml")
    device = ["--device", "cpu" if dry_run else "cuda", "--json", "RESULT"]
    tiny = ["--models", "tiny_static", "--batch", "4", "--rounds", "1", "--threads", "1"] if dry_run else []
    ways = {"bfloat16": ["--dtype", "bfloat16"], "compiled": ["--compile"], "graphs": ["--cuda-graphs"]}
    chosen: list[tuple[str, ...]] = [(), ("bfloat16",), ("graphs",), ("bfloat16", "graphs")]
    chosen += [("compiled",), ("bfloat16", "compiled"), ("bfloat16", "compiled", "graphs")]
    for names in chosen[:1] if dry_run else chosen:  # bfloat16 is emulated, and slow, on many CPUs
        options = [word for name in names for word in ways[name]]
        yield task("-".join(["step", *names]), "benchmarks/train_step.py", *device, *tiny, *options)
    small = ["--size", "32", "--batch", "1", "--rounds", "1"] if dry_run else ["--batch", "1", "32", "256"]
    yield task("inference", "benchmarks/inference.py", *device, *small, "--threads", "1")
    full = ["--data", data, "--data-name", data_name, "--results", str(ROOT / "benchmarks" / "results")]
    for table in TABLES[1:2] if dry_run else TABLES:
        for row in ["cifar10_rg"] if dry_run else rows(table, data_name):
            own = output / "runs" / ("quick" if dry_run else "paper")
            result = own / row / "seed0" / "result.json"
            script = f"benchmarks/paper/{table}.py"
            command = [script, *(["--quick"] if dry_run else full), "--rows", row, "--seeds", "0", "--output", str(own)]
            yield task(f"{table}-{row}", *command, *(["--epochs", "1"] if dry_run else []), result=result)


def rows(table: str, data_name: str) -> list[str]:
    """Return the rows of a table without a record of these data; first stages come before what starts from them."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "paper"))
    found: Any = __import__(table).TABLE
    record: Any = __import__("record")
    whole = {row.key: row for row in found.rows}
    kept = {
        result["row"]
        for result in record.of_table(found, record.read(record.RESULTS))
        if result["data"] == data_name and record.as_configured(found, whole[result["row"]], result)
    }
    missing = [row for row in found.rows if row.key not in kept]
    return [row.key for row in sorted(missing, key=lambda row: row.first_stage is not None)]


def summary(every: Sequence[Task], states: dict[str, str]) -> tuple[list[str], dict[str, Any]]:
    """Return the results so far, as the lines of a page and as figures."""
    lines, figures = ["# On a GPU", ""], {}
    for each in every:
        state = "done" if each.done else states.get(each.name, "left")
        lines.append(f"- {each.name}: {state}{'' if state in ('done', 'left') else f', see {each.log}'}")
        figures[each.name] = {"state": state}
    for each in every:
        if each.done and each.result.suffix == ".json":
            found = json.loads(each.result.read_text())
            figures[each.name]["result"] = found
            if "rows" in found:
                machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
                lines += ["", f"## {each.name}", "", f"{found['title']}; {machine}", "", *table_lines(found["rows"])]
    return lines, figures


def main(argv: Sequence[str] | None = None) -> int:
    """Do what remains for some minutes; return 0 unless something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=9, help="length of this call (default: 9)")
    parser.add_argument("--data", default="cifar10", help="images for the training runs (default: cifar10)")
    parser.add_argument("--data-name", default="cifar10", help="their content, see --data-name of table1.py")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="directory of all results")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny sizes")
    options = parser.parse_args(argv)
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("PyTorch sees no GPU here: use a machine with one, or --dry-run")
    end = time.monotonic() + 60 * options.minutes
    every = list(tasks(options.output, options.data, options.data_name, options.dry_run))
    states: dict[str, str] = {}
    with _ending_on_signals():
        for each in every:
            left = end - time.monotonic() - LAST_WORDS
            if each.done or left < LAST_WORDS:
                continue
            print(f"{each.name}, at most {left / 60:.1f} minutes", flush=True)
            states[each.name] = each.run(left)
    lines, figures = summary(every, states)
    print("\n" + "\n".join(lines))
    write_whole(options.output / "gpu.md", ("\n".join(lines) + "\n").encode(), "--output")
    write_whole(options.output / "gpu.json", (json.dumps(figures, indent=1) + "\n").encode(), "--output")
    failed = [name for name, state in states.items() if state == "failed"]
    left_over = [each.name for each in every if not each.done]
    print(f"\n{len(left_over)} of {len(every)} left: run the same command again" if left_over else "\nnothing is left")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
