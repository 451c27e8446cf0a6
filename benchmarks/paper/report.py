"""The table of finished runs beside the paper's figures."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rows import Row, Table

sys.path.append(str(Path(__file__).resolve().parents[1]))

from timing import machine

HEADER = ("model", "paper, %", "top-1, %", "runs", "real edges", "dead nodes", "multiply-adds", "training", "minutes")


def table_lines(
    table: Table, rows: Sequence[Row], results: Sequence[dict[str, Any]]
) -> tuple[list[str], dict[str, Any]]:
    """Return a Markdown table, mean ± standard deviation over seeds, and its figures.

    Args:
        table: The table.
        rows: The rows that were asked for.
        results: Results of complete runs.
    """
    figures = [_figures(row, results, table.top5) for row in rows]
    figures = [each for each in figures if each["runs"]]
    if not figures:
        return [], {}
    where = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    settings = _settings(results)
    lines = [table.title, "", settings, ", ".join(f"{key} {value}" for key, value in where.items()), ""]
    header = (*HEADER, "top-5, %") if table.top5 else HEADER
    lines += ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *map(_cells, figures))]
    lines += [
        "",
        f"top-1{' and top-5' if table.top5 else ''}: on the test images after the last step, mean ± standard deviation "
        "over seeds. Real edges (of a sparse network: weights kept in its sparse layers), dead nodes "
        "and multiply-adds per image: of the final wiring, live nodes only. Training: multiply-adds of the whole "
        "training, forward and backward, a first stage included; so are the minutes.",
    ]
    return lines, {"table": table.name, "settings": settings, "machine": where, "rows": figures}


def _figures(row: Row, results: Sequence[dict[str, Any]], with_top5: bool) -> dict[str, Any]:
    """Return the figures of a row, each averaged over its runs."""
    runs = [result for result in results if result["row"] == row.key]
    seeds = {result["seed"] for result in runs}
    stages = [result for result in results if result["row"] == row.first_stage and result["seed"] in seeds]

    def total(name: str) -> float:
        return sum(result["summary"][name] for result in [*runs, *stages]) / max(1, len(runs))

    def mean(values: list[float]) -> float:
        return statistics.fmean(values) if values else 0.0

    top1 = [100 * result["summary"]["top1"] for result in runs]
    graphs = [result["summary"]["graphs"].values() for result in runs]
    layers = [result["summary"].get("weights", {}).values() for result in runs]  # of sparse layers
    real = [sum(graph["real_edges"] for graph in each) for each in graphs]
    top5 = [100 * result["summary"]["top5"] for result in runs] if with_top5 else []
    return {
        "model": row.label,
        "paper": row.paper,
        "top1": mean(top1),
        "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,
        "runs": len(runs),
        "real_edges": mean([a + sum(layer["kept"] for layer in each) for a, each in zip(real, layers, strict=True)]),
        "dead_nodes": mean([sum(graph["dead_nodes"] for graph in each) for each in graphs]),
        "has_edges": any(graphs) or any(layers),
        "multiply_adds": mean([result["summary"]["multiply_adds"] for result in runs]),
        "training_multiply_adds": total("training_multiply_adds"),
        "minutes": total("seconds") / 60,
        **({"top5": mean(top5), "top5_std": statistics.stdev(top5) if len(top5) > 1 else None} if with_top5 else {}),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    def accuracy(name: str) -> str:
        return f"{row[name]:.1f}" + (f" ± {row[f'{name}_std']:.1f}" if row[f"{name}_std"] is not None else "")

    edges = [f"{row['real_edges']:,.0f}", f"{row['dead_nodes']:,.0f}"] if row["has_edges"] else ["", ""]
    return [
        row["model"],
        row["paper"],
        accuracy("top1"),
        str(row["runs"]),
        *edges,
        f"{row['multiply_adds'] / 1e6:.2f} M",
        f"{row['training_multiply_adds'] / 1e12:.3g} T",
        f"{row['minutes']:.1f}",
        *([accuracy("top5")] if "top5" in row else []),
    ]


def _settings(results: Sequence[dict[str, Any]]) -> str:
    """Return what all runs share: data, schedule, seeds."""
    options = [result["summary"]["options"] | {"data": result["options"]["data"]} for result in results]
    shown = ("data", "train_images", "held_out", "image_size", "epochs", "batch_size", "schedule", "momentum")
    values = {name: sorted({str(each[name]) for each in options}) for name in shown}
    seeds = sorted({result["seed"] for result in results})
    parts = [f"{name.replace('_', ' ')} {' or '.join(found)}" for name, found in values.items()]
    return ", ".join([*parts, f"seeds {', '.join(map(str, seeds))}"])
