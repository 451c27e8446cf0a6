"""Make docs/results.md and its picture from the records of finished runs.

    python benchmarks/paper/results.py

The tables' scripts write the records; for runs that are already finished:

    python benchmarks/paper/table1.py --finished --data cifar10 --results benchmarks/results

Notes about a table are in ``benchmarks/results/<table>.md``.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rules
import table1
import table2
import table4
import table6
import weight_decay
from imagenette import TABLE as IMAGENETTE
from record import RESULTS, as_configured, changed_options, of_table, read
from report import distinct, markdown, what, where
from rows import DATA, ROOT, Row, Table

from dnw_graph.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES = (table1.TABLE, table2.TABLE, table6.TABLE, table4.TABLE, weight_decay.TABLE, IMAGENETTE, rules.TABLE)
PAGE = ROOT / "docs" / "results.md"
PICTURE = ROOT / "docs" / "images" / "results.svg"
OPENING = """# Results

This page is made by `python benchmarks/paper/results.py` from the records in `benchmarks/results/`: one JSON file per
finished run, with the accuracy after every epoch, all options, commit, versions and machine.

- **top-1** is that of the last epoch, on the test images; ± is the standard deviation over seeds.
- **best epoch** is the highest top-1 of any epoch, measured on the same images and therefore slightly too good. The
  authors of the paper saved the best epoch, so their figures may be of this kind.
- The paper's figure is shown only if data and every option are those of the paper's row. CIFAR-10 as JPEG copies counts
  as the same data; the copies are lossy, so accuracies can be slightly lower.
- Real edges (in a sparse network: weights kept in its sparse layers), dead nodes, parameters and multiply-adds per
  image are those of the final wiring. "Training" is the total of multiply-adds, forward and backward. "Minutes" is wall
  time on a shared machine.
- A margin is the difference of two rows, seed by seed, with its standard error over seeds.

Known differences of the authors' code from ours, with the same data and options:

- They train on an incomplete last batch of an epoch, which we drop; their cosine is one step ahead.
- They also rank pairs that no order of blocks allows. These waste a part of k at first (in the tiny static graph 13,040
  of 32,000 edges are usable at the start), which is filled within tens of steps.
- Their random graph draws its edges independently of the weights; ours, as the paper says, keeps the largest initial
  weights.
- Tiny static: their outputs are the inputs of nodes 700 to 799, which also feed the last block (264,960 candidates);
  ours are 100 separate nodes (325,760). Tiny continuous: their in-place ReLU also clamps the solver's state.
"""


def page(results: Sequence[dict[str, Any]], notes: Path = RESULTS) -> str:
    """Return the page.

    Args:
        results: The records.
        notes: Directory with notes about tables.
    """
    lines = [OPENING]
    if results:
        lines += [f"![Top-1 after every epoch](images/{PICTURE.name})", ""]
    empty = []
    for table in TABLES:
        found = of_table(table, results)
        if not found:
            empty.append(table.title.partition(";")[0])
            continue
        lines += [f"## {table.title}", "", *_section(table, found)]
        if (note := notes / f"{table.name}.md").exists():
            lines += [note.read_text().strip(), ""]
    lines += ["## Not run yet", "", *(f"- {title}" for title in empty)]
    lines += ["- Table 3 (ImageNet): its models are counted in [Models](models.md), none was trained"]
    return "\n".join(lines).rstrip() + "\n"


def _section(table: Table, results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the runs as configured, then those with other data or options, each kind in its own table."""
    rows = {row.key: row for row in table.rows}
    by_data = [found for data in table.data if (found := _as_configured(table, results, data))]
    whole = [result for found in by_data for result in found]
    lines = [] if whole else _missing(table, whole)
    for found in by_data:
        lines += [*_runs(table, found), *_margins(table, found), *_missing(table, found)]

    def kind(result: dict[str, Any]) -> str:
        changed = changed_options(table, rows[result["row"]], result)
        return ", ".join([what(result["data"]), *(f"{name} {value}" for name, value in changed.items())])

    others = sorted((result for result in results if result not in whole), key=kind)
    for name, group in groupby(others, kind):
        lines += [f"### Other data or options: {name}", "", *_runs(table, list(group))]
    return lines


def _as_configured(table: Table, results: Sequence[dict[str, Any]], data: str) -> list[dict[str, Any]]:
    """Return the runs with some data that have the options of their rows."""
    rows = {row.key: row for row in table.rows}
    found = (result for result in of_table(table, results) if result["data"] == data)
    return [result for result in found if as_configured(table, rows[result["row"]], result)]


def _runs(table: Table, results: Sequence[dict[str, Any]]) -> list[str]:
    if not results:
        return []
    options = [result["summary"]["options"] for result in results]
    shown = "train_images", "image_size", "batch_size", "schedule", "lr", "momentum", "weight_decay", "precision"
    values = {name: distinct(each[name] for each in options) for name in shown if name not in table.free}
    data = distinct(what(result["data"]) for result in results)
    shared = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
    return [f"{data}; {shared}. {where(results)}.", "", *markdown(table, table.rows, results), ""]


def _margins(table: Table, results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the differences of rows over the seeds that both have."""
    rows = {row.key: row for row in table.rows}
    lines = []
    for one, other in table.margins:
        top1 = [{r["seed"]: r for r in results if r["row"] == key} for key in (one, other)]
        pairs = [(top1[0][seed], top1[1][seed]) for seed in sorted(top1[0].keys() & top1[1].keys())]
        if pairs:
            between = f"{rows[one].label} − {rows[other].label}"
            lines.append(f"- {between}: {_margin(pairs)}{_paper_margin(rows[one], rows[other])}.")
    return [*lines, ""] if lines else []


def _margin(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    shares = [[result["summary"]["top1"] for result in pair] for pair in pairs]
    differences = [100 * (a - b) for a, b in shares]
    mean = f"{statistics.fmean(differences):+.1f}"
    if len(pairs) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(pairs))
        return f"{mean} ± {error:.1f} points, standard error over {len(pairs)} seeds"
    images = [DATA[result["data"]].test_images for result in pairs[0]]
    error = 100 * math.sqrt(sum(p * (1 - p) / n for p, n in zip(shares[0], images, strict=True)))
    return (
        f"{mean} points with one seed; the choice of test images alone gives a standard error of {error:.1f} if the "
        "two err independently, and less if they err on the same images"
    )


def _paper_margin(one: Row, other: Row) -> str:
    if not (one.paper and other.paper):
        return ""
    means = [float(row.paper.split(" ")[0]) for row in (one, other)]
    return f" (paper: {means[0] - means[1]:+.1f})"


def _missing(table: Table, results: Sequence[dict[str, Any]]) -> list[str]:
    """Return what is missing for a complete table."""
    seeds = {row.label: sum(result["row"] == row.key for result in results) for row in table.rows}
    parts = []
    if absent := [label for label, count in seeds.items() if not count]:
        parts.append(f"No run of {'; '.join(absent)}")
    if few := [f"{label} has {count}" for label, count in seeds.items() if 0 < count < table.seeds]:
        parts.append(f"Of {table.seeds} seeds {'; '.join(few)}")
    return [f"Missing. {'. '.join(parts)}.", ""] if parts else []


def digest(results: Sequence[dict[str, Any]]) -> str:
    """Return a digest that identifies the records of a picture."""
    curves = [[result["name"], result["top1_per_epoch"]] for result in results]
    return hashlib.sha256(json.dumps(curves).encode()).hexdigest()


def drawing(results: Sequence[dict[str, Any]]) -> Figure:
    """Return a figure: top-1 after every epoch of the runs as configured, one panel per table and data."""
    from matplotlib.figure import Figure

    found = [(table, data, _as_configured(table, results, data)) for table in TABLES for data in table.data]
    shown = [each for each in found if each[-1]]
    figure = Figure(figsize=(9, 3.6 * max(1, len(shown))), layout="constrained")
    panels = figure.subplots(max(1, len(shown)), squeeze=False).ravel()
    for panel, (table, data, runs) in zip(panels, shown, strict=False):
        for row, style in zip(table.rows, styles(), strict=False):
            for place, result in enumerate(each for each in runs if each["row"] == row.key):
                curve = [100 * top1 for top1 in result["top1_per_epoch"]]
                label = None if place else row.label
                panel.plot(range(1, len(curve) + 1), curve, **style, lw=1, label=label)
        title = f"{re.split('[,;]', table.title)[0]}\n{what(data).partition(',')[0]}"
        panel.set(title=title, xlabel="epoch", ylabel="top-1, %")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def styles() -> Iterator[dict[str, Any]]:
    """Yield colours with kinds of lines, so many that no two rows of a table look alike."""
    for line, number in product(("-", "--", ":", "-."), range(10)):
        yield {"color": f"C{number}", "linestyle": line}


def picture(results: Sequence[dict[str, Any]]) -> bytes:
    """Return the drawing as an SVG."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "results", "font.size": 9}):
        file = io.BytesIO()
        drawing(results).savefig(file, format="svg", metadata={"Date": None, "Description": digest(results)})
    return file.getvalue()


def main() -> int:
    """Write the page and the picture."""
    results = read(RESULTS)
    write_whole(PAGE, page(results).encode(), "page")
    if results:
        write_whole(PICTURE, picture(results), "picture")
    return 0


if __name__ == "__main__":
    sys.exit(main())
