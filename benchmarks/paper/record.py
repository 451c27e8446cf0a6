"""The record of a run: a JSON file with its options, machine and results.

The records of finished runs are in ``benchmarks/results/<table>/``; docs/results.md is made from them.
"""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
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


def write(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), "--output")


def here(threads: int) -> dict[str, Any]:
    """Return the environment of a run: commit, versions, machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "commit": _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "machine": device_name(device),
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
    changed = {**changed_options(table, row, result), **({} if data in table.data else {"data": data})}
    name = "-".join([row.key, *(f"{name}-{value}" for name, value in changed.items()), f"seed{seed}"])
    return {
        "name": name.replace("/", "_"),
        **result,
        "starts": starts,
        "summary": summary,
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


def as_configured(table: Table, row: Row, result: dict[str, Any]) -> bool:
    """Return whether a run had the data of its table and exactly the options of its row."""
    return result["data"] in table.data and not changed_options(table, row, result)


def changed_options(table: Table, row: Row, result: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run that differ from its row; None for those that only the row has."""
    asked, configured = (_values(options) for options in (result["options"], table.configured(row)))
    names = sorted(asked.keys() | configured.keys())
    return {name: asked.get(name) for name in names if _of(asked, name) != _of(configured, name)}


def _of(options: dict[str, Any], name: str) -> Any:
    return options.get(name, UNSAID.get(name))


def _values(options: dict[str, Any]) -> dict[str, Any]:
    """Return options as numbers, booleans, mappings and strings, in whatever form they were written."""

    def value(written: Any) -> Any:
        try:
            return json.loads(written)
        except (TypeError, ValueError):
            return written

    return {name: value(written) for name, written in options.items() if name not in {"seed", "data", *MACHINE}}
