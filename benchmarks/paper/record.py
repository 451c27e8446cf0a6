"""The record of a run: a JSON file that says what was run, where, and what came out.

The records of finished runs are kept in ``benchmarks/results/<table>/``; docs/results.md is made of them.
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
# What a run had, and a row means, where neither names the option.
UNSAID = {"node_norm_eps": EPS, "warmup_epochs": 0}
# Options that may change while a run is not complete: those of the machine.
MACHINE = {option.name for option in fields(RunOptions) if not option.metadata["fixed"]} - {"data"}


def write(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), "--output")


def here(threads: int) -> dict[str, Any]:
    """Return where a run is started: commit, versions, machine."""
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
    """Return what git says about this checkout; nothing where it is none."""
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
        data: Name of the data, which stands in place of their path.
        options: The options that were asked for.
        starts: Where the run was started, and gone on with: see :func:`here`.
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
    """Write a record into the directory of all records, and return its path."""
    path = directory / result["table"] / f"{result['name']}.json"
    make_writable(path.parent, "--results")
    write(path, result)
    return path


def read(directory: Path) -> list[dict[str, Any]]:
    """Return all records of a directory, by table and name."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*/*.json"))]


def as_configured(table: Table, row: Row, result: dict[str, Any]) -> bool:
    """Return whether a run had the data of its table, and the options of its row and no others."""
    return result["data"] in table.data and not changed_options(table, row, result)


def changed_options(table: Table, row: Row, result: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run that are not those of its row; None where only the row has one."""
    asked, configured = (_values(options) for options in (result["options"], table.configured(row)))
    names = sorted(asked.keys() | configured.keys())
    return {name: asked.get(name) for name in names if _of(asked, name) != _of(configured, name)}


def _of(options: dict[str, Any], name: str) -> Any:
    return options.get(name, UNSAID.get(name))


def _values(options: dict[str, Any]) -> dict[str, Any]:
    """Return options as numbers, booleans, mappings and words, however they were written."""

    def value(written: Any) -> Any:
        try:
            return json.loads(written)
        except (TypeError, ValueError):
            return written

    return {name: value(written) for name, written in options.items() if name not in {"seed", "data", *MACHINE}}
