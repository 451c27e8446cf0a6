"""How the time of a training step grows with the number of candidates and of real edges: ``train_step.py --growth``.

The graph is stage 4 of MobileNetV1-DNW ×0.225, with its blocks of nodes halved and doubled at constant k, and with a
quarter to sixteen times as many real edges at a constant number of nodes.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from reference_formulation import ReferenceModel, dense_graph, graphs_of
from steps import DTYPES, OURS, REFERENCE, Case, check_case, steps_of
from timing import median_times
from torch import nn

from dnw_graph import NeuralGraph
from dnw_graph.whole_file import write_whole

BLOCKS, EDGES = (256, 512, 512, 512, 512, 512, 512), 72_990
SCALES = (Fraction(1, 2), Fraction(1), Fraction(2))
SHARES = (Fraction(1, 4), Fraction(1), Fraction(4), Fraction(16))
CANDIDATES, REAL = "candidates", "real edges"


def rows(options: Namespace) -> list[dict[str, Any]]:
    """Time all graphs, interleaved, and return a row for each.

    Args:
        options: ``batch``, ``size`` (of the network's images: the stage's maps are an eighth of it, or a sixteenth for
            64 pixels and more), ``dtype``, ``rounds``, and the options of :func:`steps.steps_of`.
    """
    side, dtype = options.size // (16 if options.size >= 64 else 8), DTYPES[options.dtype]
    sizes = [(CANDIDATES, tuple(int(size * scale) for size in BLOCKS), EDGES) for scale in SCALES]
    sizes += [(REAL, BLOCKS, int(EDGES * share)) for share in SHARES]
    calls: dict[tuple[tuple[int, ...], int, str], Callable[[], None]] = {}
    for blocks, edges in dict.fromkeys(size[1:] for size in sizes):
        case = _case(blocks, edges, side, options)
        check_case(case, dtype)
        calls |= {(blocks, edges, way): step for way, step in steps_of(case, dtype, options).items()}
    times = median_times(calls, options.rounds, options.device)
    found = []
    for varied, blocks, edges in sizes:
        ours, reference = times[blocks, edges, OURS], times[blocks, edges, REFERENCE]
        found.append(
            {
                "varied": varied,
                "nodes": sum(blocks),
                CANDIDATES: sum(a * b for a, b in zip(blocks[1:], accumulate(blocks), strict=False)),
                REAL: edges,
                f"{OURS}, ms": ours,
                f"{REFERENCE}, ms": reference,
                f"reference / {OURS}": reference / ours,
            }
        )
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows into a PNG file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(9, 3.8), layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, varied, title in zip(
        axes,
        (CANDIDATES, REAL),
        (f"{EDGES:,} real edges", f"{found[-1][CANDIDATES]:,} candidates"),
        strict=True,
    ):
        part = [row for row in found if row["varied"] == varied]
        x = [row[varied] for row in part]
        times = {way: [row[f"{way}, ms"] for row in part] for way in (REFERENCE, OURS)}
        label = {"textcoords": "offset points", "color": "#b5541c"}
        axis.plot(x, times[REFERENCE], "o-", color=label["color"])
        axis.annotate(REFERENCE, (x[-1], times[REFERENCE][-1]), (0, 8), ha="right", **label)
        label["color"] = "#1f5fa8"
        axis.plot(x, times[OURS], "o-", color=label["color"])
        axis.annotate(OURS, (x[0], times[OURS][0]), (0, -16), **label)
        axis.set(xscale="log", yscale="log", xlabel=f"number of {varied}", title=title)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(x, [f"{value:,}" for value in x])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.margins(x=0.08, y=0.18)
        axis.grid(color="#dddddd")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("milliseconds per training step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_whole(path, picture.getbuffer(), "path")


def _case(blocks: tuple[int, ...], edges: int, side: int, options: Namespace) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(NeuralGraph(blocks, edges), _head()).to(options.device)
    images = torch.randn(options.batch, blocks[0], side, side, device=options.device)
    labels = torch.randint(blocks[-1], (options.batch,), device=options.device)
    return Case("stage 4", {OURS: model}, _reference, images, labels)


def _reference(model: nn.Module, layout: torch.memory_format) -> ReferenceModel:
    (graph,) = graphs_of(model)
    reference = ReferenceModel(nn.Identity(), [dense_graph(graph)], _head(), nn.Identity(), layout)
    return reference.to(graph.candidates.weight.device)


def _head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
