"""Tables of finished runs, with the paper's figures for runs with the paper's data and schedule."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from record import LAID_OUT, PACKAGES, as_configured
from rows import DATA, Row, Table

NONE = "–"
IMAGES = "on the test images: after the last epoch, and after the epoch that was best on these very images"
IMAGES_HELD_OUT = (
    "with held-out images: on the test images after the epoch that was best on the held-out ones, and on the held-out "
    "ones after that epoch"
)
LEGEND = (
    "{metrics}: mean ± standard deviation over seeds, {images}. Real edges (of a sparse network: weights kept in its "
    "sparse layers), dead nodes, parameters and multiply-adds per image: of the final wiring, live nodes only. "
    "Training: multiply-adds of the whole training, forward and backward, a first stage included; so are the minutes."
)


def table_lines(
    table: Table, rows: Sequence[Row], results: Sequence[dict[str, Any]]
) -> tuple[list[str], dict[str, Any]]:
    """Return a Markdown table, mean ± standard deviation over seeds, and its figures.

    Args:
        table: The table.
        rows: The requested rows.
        results: Records of finished runs.
    """
    figures = [_figures(table, row, results) for row in rows]
    figures = [each for each in figures if each["runs"]]
    if not figures:
        return [], {}
    shared, made = settings(results), where(results)
    lines = [table.title, "", shared, made, "", *_markdown(table, figures), ""]
    held_out = any(result["summary"]["options"]["held_out"] for result in results)
    images = IMAGES_HELD_OUT if held_out else IMAGES
    lines.append(LEGEND.format(metrics="top-1 and top-5" if table.top5 else "top-1", images=images))
    return lines, {"table": table.name, "settings": shared, "machine": made, "rows": figures}


def markdown(table: Table, rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> list[str]:
    """Return only the lines of the table, with the rows that have a run."""
    return _markdown(table, [each for row in rows if (each := _figures(table, row, results))["runs"]])


def _figures(table: Table, row: Row, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a row, each averaged over its runs."""
    runs = [result for result in results if result["row"] == row.key]
    seeds = {result["seed"] for result in runs}
    stages = [result for result in results if result["row"] == row.first_stage and result["seed"] in seeds]

    def total(name: str) -> float:
        return sum(result["summary"][name] for result in [*runs, *stages]) / max(1, len(runs))

    def mean(values: list[float]) -> float:
        return statistics.fmean(values) if values else 0.0

    def accuracy(name: str) -> dict[str, float | None]:
        values = [100 * result["summary"][name] for result in runs]
        return {name: mean(values), f"{name}_std": statistics.stdev(values) if len(values) > 1 else None}

    graphs = [result["summary"]["graphs"].values() for result in runs]
    layers = [result["summary"]["weights"].values() for result in runs]  # of sparse layers
    real = [sum(graph["real_edges"] for graph in each) for each in graphs]
    return {
        "model": row.label,
        "paper": row.paper if runs and all(as_configured(table, row, result) for result in runs) else "",
        **accuracy("top1"),
        **accuracy("best_top1"),
        "runs": len(runs),
        "epochs": sorted({result["summary"]["options"]["epochs"] for result in runs}),
        "real_edges": mean([a + sum(layer["kept"] for layer in each) for a, each in zip(real, layers, strict=True)]),
        "dead_nodes": mean([sum(graph["dead_nodes"] for graph in each) for each in graphs]),
        "has_edges": any(graphs) or any(layers),
        "has_nodes": any(graphs),
        "parameters": mean([result["summary"]["parameters"] for result in runs]),
        "multiply_adds": mean([result["summary"]["multiply_adds"] for result in runs]),
        "training_multiply_adds": total("training_multiply_adds"),
        "options": {name: distinct(result["summary"]["options"][name] for result in runs) for name in table.free},
        "minutes": total("seconds") / 60,
        "threads": sorted({start["threads"] for result in [*runs, *stages] for start in result["starts"]}),
        **(accuracy("top5") if table.top5 else {}),
    }


def _markdown(table: Table, figures: Sequence[dict[str, Any]]) -> list[str]:
    header = ["model", "top-1, %", "best epoch, %", *(["top-5, %"] if table.top5 else []), "seeds", "epochs"]
    header += ["real edges", "dead nodes", "parameters", "multiply-adds", "training"]
    header += [*(name.replace("_", " ") for name in table.free), "minutes × threads"]
    rows = [_cells(row) for row in figures]
    if any(row["paper"] for row in figures):
        header.insert(1, "paper, %")
        for row, cells in zip(figures, rows, strict=True):
            cells.insert(1, row["paper"] or NONE)
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def _cells(row: dict[str, Any]) -> list[str]:
    def accuracy(name: str) -> str:
        return f"{row[name]:.1f}" + (f" ± {row[f'{name}_std']:.1f}" if row[f"{name}_std"] is not None else "")

    return [
        row["model"],
        *(accuracy(name) for name in ("top1", "best_top1", "top5") if name in row),
        str(row["runs"]),
        " or ".join(map(str, row["epochs"])),
        f"{row['real_edges']:,.0f}" if row["has_edges"] else NONE,
        f"{row['dead_nodes']:,.0f}" if row["has_nodes"] else NONE,
        f"{row['parameters']:,.0f}",
        f"{row['multiply_adds'] / 1e6:.2f} M",
        f"{row['training_multiply_adds'] / 1e12:.3g} T",
        *row["options"].values(),
        f"{row['minutes']:.1f} × {' or '.join(map(str, row['threads']))}",
    ]


def distinct(values: Iterable[Any]) -> str:
    """Return different values, each once."""
    return " or ".join(sorted({str(value) for value in values}))


def settings(results: Sequence[dict[str, Any]]) -> str:
    """Return the settings shared by all runs: data, schedule, seeds."""
    options = [result["summary"]["options"] | {"data": what(result["data"])} for result in results]
    shown = (
        "data",
        "train_images",
        "held_out",
        "image_size",
        "epochs",
        "batch_size",
        "schedule",
        "momentum",
        "precision",
    )
    parts = [f"{name.replace('_', ' ')} {distinct(each[name] for each in options)}" for name in shown]
    seeds = sorted({result["seed"] for result in results})
    return ", ".join([*parts, f"seeds {', '.join(map(str, seeds))}"])


def what(data: str) -> str:
    """Return the description of named data."""
    return DATA[data].what if data in DATA else data


def where(results: Sequence[dict[str, Any]]) -> str:
    """Return the environment of the runs: machine, versions, commits."""
    starts = [start | {"commit": _short(start["commit"])} for result in results for start in result["starts"]]
    names = ("machine", "threads", *LAID_OUT, "python", *PACKAGES, "commit", "date")
    given = {name for start in starts for name in start}
    starts = [{name: value for name, value in LAID_OUT.items() if name in given} | start for start in starts]
    values = {name: distinct(start[name] for start in starts if name in start) for name in names}
    return ", ".join(f"{name} {found}" for name, found in values.items() if found)


def _short(commit: str) -> str:
    """Return a commit in 8 digits; a plus means modified files."""
    return commit[:8] + ("+" if commit.endswith("+") else "")
