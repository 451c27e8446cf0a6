"""Curves of a run, from its ``metrics.csv``."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.visualize import style

if TYPE_CHECKING:
    import matplotlib.figure

# Per panel: its title and its curves: column, label, colour and dashes.
_PANELS: tuple[tuple[str, tuple[tuple[str, str, str, str], ...]], ...] = (
    ("loss", (("train/loss", "training", style.SIDE, "-"), ("val/loss", "evaluation", style.MAIN, "-"))),
    ("accuracy", (("val/top1", "top-1", style.MAIN, "-"), ("val/top5", "top-5", style.SIDE, "--"))),
    ("learning rate", (("train/lr", "learning rate", style.MAIN, "-"),)),
    ("edges born per epoch", (("wiring/edges_swapped", "all graphs", style.BORN, "-"),)),
    ("live nodes", (("wiring/live_nodes", "all graphs", style.LIVE, "-"),)),
)
_SHARES = {"accuracy", "live nodes"}


@checked
def plot_training(path: str | Path) -> matplotlib.figure.Figure:
    """Draw the curves of a run over its steps: losses, accuracies, learning rate, edges born and live nodes.

    Args:
        path: The directory of a run, or its ``metrics.csv``.

    Returns:
        The figure; ``figure.savefig("training.png")`` writes it. Curves that were not logged are omitted.

    Raises:
        InputError: If the file does not exist or has none of these columns, or matplotlib is not installed.
    """
    path = Path(path)
    path = path / "metrics.csv" if path.is_dir() else path
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): give the directory of a run") from error
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for column, value in row.items():
            if value and column and row.get("step"):
                try:
                    found.setdefault(column, []).append((int(float(row["step"])), float(value)))
                except (TypeError, ValueError):
                    raise InputError(f"{path} has {value!r} under {column}: expected numbers") from None
    panels = [(title, lines) for title, lines in _PANELS if any(column in found for column, *_ in lines)]
    if not panels:
        raise InputError(f"{path} has no curve of a run: expected columns such as train/loss, val/top1 and step")
    figure = style.figure(3.6 * min(3, len(panels)), 2.8 * (1 + (len(panels) > 3)))
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    axes = figure.subplots(1 + (len(panels) > 3), min(3, len(panels)), squeeze=False).flatten()
    for ax, (title, lines) in zip(axes, panels, strict=False):
        for column, label, colour, dashes in lines:
            if column in found:
                steps, values = zip(*found[column], strict=True)
                look: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(steps) < 40 else {}
                ax.plot(steps, values, color=colour, linestyle=dashes, label=label, linewidth=1.4, **look)
        if len(ax.lines) > 1:
            ax.legend(frameon=False, fontsize="small")
        # As many decimals as the ticks require.
        ax.yaxis.set_major_formatter(PercentFormatter(1) if title in _SHARES else StrMethodFormatter("{x:,g}"))
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    # The last epoch may be incomplete.
    epochs = f", up to epoch {found['epoch'][-1][1] + 1:g}" if "epoch" in found else ""
    figure.suptitle(f"{path.parent.resolve().name}{epochs}", fontsize="medium")
    return figure
