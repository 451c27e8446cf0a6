"""Runs the rows of a table of the paper: any seeds, any length of schedule, several at once, resumable row by row.

Every run is one call of an example with a configuration, such as one of ``examples/configs/``. Complete runs are not
repeated; stopped ones resume from their last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from jsonargparse import ArgumentError
from record import MACHINE, here, keep, record, write
from report import table_lines
from rows import DATA, ROOT, Row, Table

from dnw_graph import InputError
from dnw_graph.errors import unknown_name
from dnw_graph.training.command_line import one_line, read_options
from dnw_graph.whole_file import make_writable, write_whole

BAD_INPUT = 2
# Options of the example that the runner sets itself.
OWN = ("complete", "config", "evaluate", "init_from", "output", "resume", "seed")


@dataclass(frozen=True)
class Run:
    """One row with one seed.

    Attributes:
        table: The table.
        row: The row.
        seed: The seed.
        data: Name of the data, see ``rows.DATA``; their path if they have none.
        directory: Directory of the run.
        options: All options as written: those of the configuration and of the command line.
        command: The call of the example, without ``--resume``.
    """

    table: Table
    row: Row
    seed: int
    data: str
    directory: Path
    options: dict[str, Any]
    command: list[str]

    @property
    def result(self) -> Path:
        """The run's JSON file, written when it is complete."""
        return self.directory / "result.json"

    def check(self) -> None:
        """Refuse a directory that holds a run with other options.

        Raises:
            InputError: If it does.
        """
        asked = self.directory / "options.json"
        if asked.exists():
            before = json.loads(asked.read_text())
            for name in sorted({*before, *self.options} - MACHINE):
                if before.get(name) != self.options.get(name):
                    raise InputError(
                        f"{self.directory} holds a run with {name} {before.get(name)!r}, not "
                        f"{self.options.get(name)!r}: give another --output, or remove the directory"
                    )
        make_writable(self.directory, "--output")
        write(asked, self.options)

    def execute(self, threads: int) -> dict[str, Any] | None:
        """Do the run, or the rest of it, and return its record; None if it failed or was stopped."""
        if (result := self.finished()) is not None:
            return result
        command = self.command
        if (last := self.directory / "last.ckpt").exists():
            command = [*command, "--resume", str(last)]
        write(self.directory / "starts.json", [*self._starts(), here(threads, self.options)])
        start = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(self.directory / "log.txt", "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _running.append(process)
        if _stopped.is_set():  # just before it started
            process.terminate()
        status = process.wait()
        _running.remove(process)
        if status:
            print(f"{self.row.label}, seed {self.seed}: status {status}, see {self.directory / 'log.txt'}", flush=True)
            return None
        result = self.finished()
        assert result is not None
        print(
            f"{self.row.label}, seed {self.seed}: top-1 {result['summary']['top1']:.2%}, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
        return result

    def finished(self) -> dict[str, Any] | None:
        """Return the record of the run if it is finished, and write it to its directory."""
        if not (self.directory / "summary.json").exists():
            return None
        result = record(self.table, self.row, self.seed, self.data, self.options, self._starts(), self.directory)
        write(self.result, result)
        return result

    def _starts(self) -> list[dict[str, Any]]:
        path = self.directory / "starts.json"
        return list(json.loads(path.read_text())) if path.exists() else []


_running: list[subprocess.Popen[bytes]] = []
_stopped = threading.Event()


def _stop(number: int, frame: FrameType | None) -> None:
    """Pass SIGTERM on to the runs, which save their last steps, and go on as after Ctrl-C."""
    _stopped.set()
    for process in list(_running):
        process.terminate()
    raise KeyboardInterrupt


def main(table: Table, description: str, argv: Sequence[str] | None = None) -> int:
    """Run a table from its command line.

    Args:
        table: The table.
        description: What the script does, for ``--help``.
        argv: Arguments. Default: those of the process.

    Returns:
        The exit status: 0; 1 if a run failed or was stopped; 2 after one line on stderr for input that cannot be used.
    """
    options, further = _parser(table, description).parse_known_args(argv)
    try:
        rows = _chosen(table, options.rows)
        runs = _runs(table, rows, options, _pairs(further))
        if options.results is not None and any(run.options.get("held_out") not in (0, "0") for run in runs):
            raise InputError("--results keeps accuracies on test images; with --held-out they are of other images")
        if options.finished:
            results = [result for run in runs if (result := run.finished()) is not None]
            runs = runs[: len(results)]
        else:
            _check_options(runs)
            for run in runs:
                run.check()
            threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.jobs)
            results = _execute(runs, options.jobs, threads)
        if options.results is not None:
            for result in results:
                keep(result, options.results)
        lines, figures = table_lines(table, rows, results)
        if lines:
            print("\n" + "\n".join(lines))
            write_whole(options.output / f"{table.name}.md", ("\n".join(lines) + "\n").encode(), "--output")
            for path in (options.output / f"{table.name}.json", *([options.json] if options.json else [])):
                write(path, figures)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; repeat the command to continue", file=sys.stderr)
        return 1
    return 0 if len(results) == len(runs) else 1


def _parser(table: Table, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"Any other option, such as --epochs 10, is passed to {table.example} for every run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="every row end to end on built-in digits, in minutes")
    parser.add_argument("--rows", nargs="+", metavar="CONFIG", help="rows to run, by the names of their configurations")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds (default: those of a complete row; quick: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads of each run (default: the cores, shared by the jobs)")
    parser.add_argument("--configs", type=Path, default=table.configs, help="directory of the configurations")
    parser.add_argument(
        "--data-name",
        help=f"content of a directory of images: one of {', '.join(DATA)}; needed to compare with the paper's rows",
    )
    parser.add_argument("--finished", action="store_true", help="run nothing: only report finished runs")
    parser.add_argument(
        "--results", type=Path, help="also write the record of each finished run here, as in benchmarks/results"
    )
    parser.add_argument("--output", type=Path, help="directory of all runs (default: runs/paper, quick: runs/quick)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def _pairs(words: list[str]) -> dict[str, str | bool]:
    """Return ``--name value``, ``--name`` and ``--no-name`` as a mapping from the names of fields."""
    pairs: dict[str, str | bool] = {}
    name = None
    parts = [word.split("=", 1) if word.startswith("--") else [word] for word in words]
    for word in chain.from_iterable(parts):
        if word.startswith("--"):
            name = word.removeprefix("--").removeprefix("no-").replace("-", "_")
            pairs[name] = not word.startswith("--no-")
        elif name is None:
            raise InputError(f"options for the runs must be --name value; got {shlex.join(words)!r}")
        else:
            pairs[name], name = word, None
    for own in OWN:
        if own in pairs:
            raise InputError(f"--{own} is set for every run: use --seeds, --rows, --configs and --output")
    return pairs


def _chosen(table: Table, keys: list[str] | None) -> list[Row]:
    """Return the requested rows, with those that they start from, in the order of the table."""
    known = {row.key: row for row in table.rows}
    for key in keys or []:
        if key not in known:
            raise InputError(f"{table.name} has no row {key!r}: known are {', '.join(known)}")
    wanted = set(keys or known)
    wanted |= {stage for key in wanted if (stage := known[key].first_stage) is not None}
    return [row for row in table.rows if row.key in wanted]


def _runs(table: Table, rows: list[Row], options: argparse.Namespace, given: dict[str, str | bool]) -> list[Run]:
    if options.jobs < 1:
        raise InputError(f"--jobs is {options.jobs}: expected 1 or more")
    options.output = options.output or Path("runs", "quick" if options.quick else "paper")
    seeds = dict.fromkeys(options.seeds or ([0] if options.quick else range(table.seeds)))
    shared = {**table.options, **(table.quick if options.quick else {}), **given}
    if options.data_name is not None and options.data_name not in DATA:
        raise unknown_name("--data-name", options.data_name, DATA)
    runs = []
    for row in rows:
        config = options.configs / f"{row.config}.yaml"
        if not config.is_file():
            raise InputError(f"{config} does not exist: --configs needs a file for every row")
        configured = yaml.safe_load(config.read_text())
        for seed in seeds:
            directory = options.output / row.key / f"seed{seed}"
            changed = {**shared, **row.options, "seed": str(seed)}
            if options.quick:
                changed |= _shorter_warmup({**configured, **changed})
            command = [sys.executable, str(ROOT / table.example), "--config", str(config), "--output", str(directory)]
            for name, value in changed.items():
                flag = name.replace("_", "-")
                if isinstance(value, bool):
                    command.append(f"--{flag}" if value else f"--no-{flag}")
                else:
                    command.append(f"--{flag}={value}")
            if row.first_stage:
                command += ["--complete", str(options.output / row.first_stage / f"seed{seed}")]
            values = {**configured, **changed}
            data = options.data_name or str(values["data"])
            runs.append(Run(table, row, seed, data, directory, values, command))
    return runs


def _shorter_warmup(values: dict[str, Any]) -> dict[str, str]:
    """Return a warm-up that ends an epoch before the run, if that of a row is longer."""
    epochs, warmup = (str(values.get(name, 0)) for name in ("epochs", "warmup_epochs"))
    longer = epochs.isdecimal() and warmup.isdecimal() and int(warmup) >= int(epochs) > 0
    return {"warmup_epochs": str(int(epochs) - 1)} if longer else {}


def _check_options(runs: list[Run]) -> None:
    """Refuse options that the script of a row would refuse; its seeds do not differ.

    Raises:
        InputError: If there are any.
    """
    for run in {run.row.key: run for run in runs}.values():
        models = run.table.models
        try:
            read_options("", models.options, models.defaults, run.command[2:])
        except (InputError, ArgumentError) as error:
            raise InputError(f"{run.row.key}: {one_line(error)}") from error


def _execute(runs: list[Run], jobs: int, threads: int) -> list[dict[str, Any]]:
    """Do all runs, first stages first, and return the results of the complete ones."""
    results = []
    _stopped.clear()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for second in (False, True):
            executor = ThreadPoolExecutor(jobs)
            try:
                chosen = [run for run in runs if bool(run.row.first_stage) is second]
                results += [result for result in executor.map(lambda run: run.execute(threads), chosen) if result]
            finally:
                # Ctrl-C reaches the runs too: each saves its last step, and no other is started.
                executor.shutdown(cancel_futures=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    return results
