"""Compares rules: the same training with every rule and every seed."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dnw_graph.errors import InputError, unknown_name
from dnw_graph.stopping import without_start
from dnw_graph.training.command_line import launched
from dnw_graph.training.resuming import check_same_run
from dnw_graph.whole_file import make_writable, write_whole
from dnw_graph.wirings import WIRINGS

COLUMNS = (
    "rule",
    "seed",
    "top1",
    "top5",
    "best_top1",
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
            requested, or a complete run had other options.
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
    rows: list[dict[str, Any]] = []
    for rule in dict.fromkeys(rules):
        for seed in dict.fromkeys(seeds):
            directory = output / rule / f"seed{seed}"
            last, result = directory / "last.ckpt", directory / "summary.json"
            words = [*options, "--wiring", rule, "--seed", str(seed), "--output", str(directory)]
            if result.exists():
                _check_same(result, requested(words))
            else:
                print(f"{rule}, seed {seed}: {directory}", flush=True)
                if status := train(["--resume", str(last), *without_start(words)] if last.exists() else words):
                    return status
            summary = json.loads(result.read_text())
            rows.append({"rule": rule, "seed": seed, **{name: summary[name] for name in COLUMNS[2:]}})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(output / "compare.csv", text.getvalue().encode(), "--output")
    print("\n".join(["", *table(rows)]))
    _plot(rows, output / "compare.png")
    print(f"written to {output}: compare.csv, compare.png")
    return 0


def _check_same(result: Path, asked: dict[str, Any]) -> None:
    """Refuse a complete run with other options; those without a value depend on the data."""
    had, now = json.loads(result.read_text())["options"], json.loads(json.dumps(asked))
    check_same_run(str(result), had, now, [name for name in now if name in had and now[name] is not None])


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
