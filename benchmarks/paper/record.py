"""The record of a run: a JSON file with its options, machine and results.

The records of finished runs are in ``benchmarks/results/<table>/``; docs/results.md is made from them.
"""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rows import ROOT, Row, Table

sys.path.append(str(Path(__file__).resolve().parents[1]))

from timing import device_name

from dnw_graph import InputError
from dnw_graph.node_functions import EPS
from dnw_graph.training import RunOptions
from dnw_graph.whole_file import make_writable, write_whole

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "lightning")
# Values of options that neither a run nor a row names.
UNSAID = {"node_norm_eps": EPS, "warmup_epochs": 0, "held_out": 0}
# Options that may change until a run is complete: those of the machine.
MACHINE = {option.name for option in fields(RunOptions) if not option.metadata["fixed"]} - {"data"}
# Those among them that are recorded with the machine if given (batch norms see the images of one device, for instance),
# and what holds otherwise.
LAID_OUT = {"devices": 1, "num_nodes": 1, "compile": False}


def write(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), "--output")


def here(threads: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return the environment of a run with these options: commit, versions, machine, devices."""
    on_gpu = torch.cuda.is_available() and options.get("accelerator") != "cpu"
    return {
        **{name: options[name] for name in LAID_OUT if name in options},
        "commit": _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "machine": device_name(torch.device("cuda" if on_gpu else "cpu")),
        "threads": threads,
        "date": date.today().isoformat(),
    }


def _git(*command: str) -> str:
    """Return git's output for this checkout; empty outside of a checkout."""
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def record(
    table: Table, row: Row, seed: int, data: str, options: dict[str, Any], starts: list[dict[str, Any]], directory: Path
) -> dict[str, Any]:
    """Return the record of a finished run.

    Args:
        table: The table.
        row: The row.
        seed: The seed.
        data: Name of the data, used instead of their path.
        options: The requested options.
        starts: The environments in which the run was started and resumed, see :func:`here`.
        directory: Directory of the run.
    """
    summary = json.loads((directory / "summary.json").read_text())
    kept = {name: value for name, value in options.items() if name not in MACHINE} | {"data": data}
    summary["options"]["data"] = data
    asked, had = _values(kept), _values(summary["options"])
    for name in sorted(asked.keys() & had.keys()):
        if asked[name] != had[name]:
            raise InputError(
                f"{directory} holds a run with {name} {had[name]!r}, not {asked[name]!r}: give the same options"
            )
    result = {"table": table.name, "row": row.key, "seed": seed, "data": data, "options": kept}
    result["summary"] = summary
    changed = {**changed_options(table, row, result), **({} if data == table.data[0] else {"data": data})}
    name = "-".join([row.key, *(f"{name}-{value}" for name, value in changed.items()), f"seed{seed}"])
    return {
        "name": name.replace("/", "_"),
        **result,
        "starts": starts,
        "top1_per_epoch": top1_per_epoch(directory / "metrics.csv"),
    }


def top1_per_epoch(path: Path) -> list[float]:
    """Return the accuracy on the test images after each epoch, from the metrics of a run."""
    with open(path, newline="", encoding="utf-8") as file:
        return [round(float(row["val/top1"]), 5) for row in csv.DictReader(file) if row.get("val/top1")]


def keep(result: dict[str, Any], directory: Path) -> Path:
    """Write a record to the directory of all records, and return its path."""
    path = directory / result["table"] / f"{result['name']}.json"
    make_writable(path.parent, "--results")
    write(path, result)
    return path


def read(directory: Path) -> list[dict[str, Any]]:
    """Return all records of a directory, by table and name."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*/*.json"))]


def of_table(table: Table, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of a table's rows; of runs that belong to several tables, each once."""
    rows = {row.key for row in table.rows}
    return list({result["name"]: result for result in results if result["row"] in rows}.values())


def as_configured(table: Table, row: Row, result: dict[str, Any]) -> bool:
    """Return whether a run had the data of its table and the options of its row."""
    return result["data"] in table.data and not changed_options(table, row, result)


def changed_options(table: Table, row: Row, result: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run that differ from its row, but may not; None for those that only the row has."""
    asked, configured = _values(result["options"]), UNSAID | _values(table.configured(row))
    # What was not asked for is the example's default, which the run has noted.
    had = UNSAID | {name: value for name, value in _values(result["summary"]["options"]).items() if name in configured}
    had |= asked
    names = sorted((had.keys() | configured.keys()) - set(table.free))
    return {name: had.get(name) for name in names if had.get(name) != configured.get(name)}


def _values(options: dict[str, Any]) -> dict[str, Any]:
    """Return options as numbers, booleans, mappings and strings, in whatever form they were written."""

    def value(written: Any) -> Any:
        try:
            return json.loads(written)
        except (TypeError, ValueError):
            return written

    return {name: value(written) for name, written in options.items() if name not in {"seed", "data", *MACHINE}}
