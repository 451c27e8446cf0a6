"""Shared by all benchmarks: interleaved timing, a table, JSON, and a description of the machine."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch_geometric

from dnw_graph.whole_file import write_whole

Way = TypeVar("Way")


def median_times(
    ways: Mapping[Way, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Way, float]:
    """Return the median time of each variant, in milliseconds: wall time, or that of another clock.

    The variants take turns, so that a slow phase of a shared machine affects all of them alike.
    """
    times: dict[Way, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            _wait(device)
            start = clock()
            way()
            _wait(device)
            if turn:  # The first turn warms up.
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def machine(device: torch.device) -> dict[str, str]:
    """Return the machine of the measurements."""
    name = device_name(device)
    return {
        "device": f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "torch": torch.__version__,
        "torch_geometric": torch_geometric.__version__,
        "date": date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a device's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return models[0].split(":")[1].strip() if models else platform.machine()
    return platform.machine()


COMMON = ("device", "threads", "rounds")


def arguments(description: str, takes: Sequence[str] = COMMON) -> argparse.ArgumentParser:
    """Return a parser with ``--json`` and those of the common options that a benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    cpu = torch.device("cpu")
    if "device" in takes:
        parser.add_argument("--device", type=torch.device, default=cpu, help="cpu or cuda")
    else:
        parser.set_defaults(device=cpu)
    if "threads" in takes:
        parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)")
    if "rounds" in takes:
        parser.add_argument("--rounds", type=int, default=7, help="timed turns; the median is shown")
    return parser


def use_tf32(allowed: bool) -> None:
    """Turn TF32 on or off for float32 products and convolutions on a GPU, whose defaults differ in PyTorch."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def report(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    options: argparse.Namespace,
    measured: Mapping[str, str] | None = None,
    further: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Print rows as a Markdown table and write them as JSON if asked to.

    Args:
        title: What the table shows.
        rows: The rows, with the same columns.
        options: ``device``, and ``json``, the file to write or None.
        measured: Further facts about the machine.
        further: Further tables by title.
    """
    where = {**machine(options.device), **(measured or {})}
    content: dict[str, Any] = {"title": title, "machine": where, "rows": list(rows)}
    print(f"{title}\n{', '.join(f'{key} {value}' for key, value in where.items())}\n")
    print_table(rows)
    for name, others in (further or {}).items():
        print(f"\n{name}\n")
        print_table(others)
        content.setdefault("further", []).append({"title": name, "rows": list(others)})
    if options.json is not None:
        write_whole(options.json, (json.dumps(content, indent=1) + "\n").encode(), "--json")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with the same columns as a Markdown table."""
    print("\n".join(table_lines(rows)))


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table of rows with the same columns."""
    columns = list(rows[0])
    table = [columns, *([_text(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    table.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
