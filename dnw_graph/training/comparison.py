"""Compares rules: the same training with every rule and every seed."""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dnw_graph.checkpoint import SECTION, read_checkpoint
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.recipes.options import completed
from dnw_graph.stopping import without_start
from dnw_graph.training.command_line import launched
from dnw_graph.training.resuming import check_same_run, origin, shown
from dnw_graph.whole_file import make_writable, write_whole
from dnw_graph.wirings import WIRINGS

COLUMNS = (
    "rule",
    "seed",
    "top1",
    "top5",
    "best_top1",
    "held_out",
    "parameters",
    "multiply_adds",
    "training_multiply_adds",
    "seconds",
)


def compare(
    rules: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    options: list[str],
    train: Callable[[list[str]], int],
    requested: Callable[[list[str]], dict[str, Any]],
) -> int:
    """Train every rule with every seed, then print a table and write ``compare.csv`` and ``compare.png``.

    Complete runs are not repeated; stopped ones are resumed.

    Args:
        rules: Names of the rules.
        seeds: The seeds.
        output: Directory of all runs; each gets ``<rule>/seed<n>/``.
        options: Further options of every run.
        train: Trains with options and returns the exit status.
        requested: Returns the values of options, as ``summary.json`` has them.

    Returns:
        The status of the first run that failed or was stopped, or 0.

    Raises:
        InputError: If a rule is unknown, an option is one that the comparison sets itself, several processes are
            requested, or a run has other options than the command or than another run.
    """
    for rule in rules:
        if rule not in WIRINGS and "." not in rule:
            raise unknown_name("wiring", rule, WIRINGS)
    own = ("--wiring", "--seed", "--output", "--resume", "--evaluate")
    if taken := [word for word in options if word.partition("=")[0] in own]:
        raise InputError(f"{taken[0]} is set for every run: use --rules, --seeds and --output")
    several = [word for word in options if word.partition("=")[0] in ("--devices", "--num-nodes")]
    if several or max([1, *launched().values()]) > 1:
        raise InputError("compare trains in one process: train each run with dnw-graph train on several devices")
    make_writable(output, "--output")
    runs: dict[Path, tuple[str, int, list[str]]] = {}
    for rule in dict.fromkeys(rules):
        for seed in dict.fromkeys(seeds):
            directory = output / rule / f"seed{seed}"
            words = [*options, "--wiring", rule, "--seed", str(seed), "--output", str(directory)]
            runs[directory] = rule, seed, words
    rows: list[dict[str, Any]] = []
    first: dict[str, tuple[Any, Path]] = {}  # Values of options that are not given, and the first run that has them.
    for directory, (_, _, words) in runs.items():
        _check_same(directory, words, requested, first)
    for directory, (rule, seed, words) in runs.items():
        last, result = directory / "last.ckpt", directory / "summary.json"
        if not result.exists():
            print(f"{rule}, seed {seed}: {directory}", flush=True)
            if status := train(["--resume", str(last), *without_start(words)] if last.exists() else words):
                return status
            _check_same(directory, words, requested, first)
        summary = json.loads(result.read_text())
        values = {**summary, "rule": rule, "seed": seed, "held_out": summary["options"].get("held_out", 0)}
        rows.append({name: values[name] for name in COLUMNS})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(output / "compare.csv", text.getvalue().encode(), "--output")
    print("\n".join(["", *table(rows)]))
    _plot(rows, output / "compare.png")
    print(f"written to {output}: compare.csv, compare.png")
    return 0


def _check_same(
    directory: Path,
    words: list[str],
    requested: Callable[[list[str]], dict[str, Any]],
    first: dict[str, tuple[Any, Path]],
) -> None:
    """Refuse a complete or stopped run with other options than those given, or than another run."""
    path, had = _options_of(directory)
    if not had:
        return
    now = _plain(requested(words))
    given = [name for name in now if name in had and now[name] is not None]
    check_same_run(str(path), had, now, given)
    data_dependent = {name: value for name, value in had.items() if name not in given}
    for name, value in data_dependent.items():
        other, where = first.setdefault(name, (value, directory))
        if value != other:
            raise InputError(
                f"{origin(name)} is {shown(name, other)} in {where}, but {shown(name, value)} in {directory}: they are "
                "not compared; delete one of them, or give another --output"
            )


def _options_of(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of a complete or stopped run, and its options; none if there is no run."""
    result, last = directory / "summary.json", directory / "last.ckpt"
    if result.exists():
        return result, _plain(json.loads(result.read_text())["options"])
    if last.exists():
        section = read_checkpoint(last)[SECTION]
        data = {name: value for name, value in section.get("machine", {}).items() if name == "data"}
        return last, _plain({**section["options"], **data})
    return last, {}


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Return options as JSON has them, completed, and with one path of a directory of images."""
    options = json.loads(json.dumps(completed(options)))
    if os.path.isdir(data := options.get("data", "")):
        options["data"] = os.path.abspath(data)
    return options


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a Markdown table: per rule the mean top-1 with its standard deviation over seeds, and the costs."""
    lines = ["| rule | seeds | top-1 | multiply-adds | training |", "|---|---|---|---|---|"]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        runs = [row for row in rows if row["rule"] == rule]
        top1 = [100 * row["top1"] for row in runs]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        per_image, training = (
            statistics.mean(row[name] for row in runs) for name in ("multiply_adds", "training_multiply_adds")
        )
        cost = f"{per_image / 1e6:,.1f} M | {training / 1e12:,.3g} T"
        lines.append(f"| {rule} | {len(runs)} | {statistics.mean(top1):.2f}{spread} | {cost} |")
    return lines


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["rule"] for row in rows))
    axes.scatter([names.index(row["rule"]) for row in rows], [100 * row["top1"] for row in rows])
    means = [statistics.mean(100 * row["top1"] for row in rows if row["rule"] == name) for name in names]
    axes.hlines(means, [n - 0.2 for n in range(len(names))], [n + 0.2 for n in range(len(names))])
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("top-1 (%)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getbuffer(), "--output")
