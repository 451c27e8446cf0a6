"""Draws Figure 3 of the paper from a graph: one step of training in three pictures, ``docs/images/method-*.svg``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from dnw_graph import CandidateEdges, NeuralGraph

DIRECTORY = Path(__file__).parent.parent / "docs" / "images"
REAL, HALLUCINATED, GRADIENT, NEW = "#37474f", "#b0bec5", "#e65100", "#2e7d32"
BLOCKS = (3, 3, 2)
PLACES = [(column, row - size / 2) for column, size in enumerate(BLOCKS) for row in range(size)]

Edges = list[tuple[int, int]]


def axes(title: str) -> Axes:
    """Return an empty picture."""
    ax = plt.figure(figsize=(3.2, 3), layout="constrained").gca()
    ax.set_title(title, fontsize=12)
    ax.set(xlim=(-0.25, 2.25), ylim=(-2.4, 0.85), xticks=[], yticks=[])
    ax.axis("off")
    return ax


def between(
    ax: Axes, ends: tuple[int, int], start: float = 0.0, end: float = 1.0, style: str = "-", **looks: object
) -> None:
    """Draw part of an edge as an arrow."""
    (x0, y0), (x1, y1) = (PLACES[node] for node in ends)
    points = [(x0 + (x1 - x0) * part, y0 + (y1 - y0) * part) for part in (start, end)]
    arrow = {"arrowstyle": style, "shrinkA": 0, "shrinkB": 0} | looks
    ax.annotate("", xy=points[1], xytext=points[0], arrowprops=arrow)


def _scaled(pairs: Edges, values: Tensor, largest: float) -> dict[tuple[int, int], float]:
    """Return magnitudes as widths of lines."""
    return dict(zip(pairs, (largest * values.detach().abs() / values.detach().abs().max()).tolist(), strict=True))


def finish(ax: Axes, name: str, *lines: tuple[str, str]) -> None:
    """Draw the nodes and a legend, and write the picture."""
    x, y = zip(*PLACES, strict=True)
    ax.scatter(x, y, s=170, color="white", edgecolor=REAL, linewidth=1.5, zorder=3)
    for number, (text, color) in enumerate(lines):
        ax.text(1, -1.95 - 0.27 * number, text, color=color, ha="center", fontsize=10)
    plt.savefig(DIRECTORY / f"method-{name}.svg", metadata={"Date": None})
    plt.close()


def main() -> None:
    """Take one step of a graph of eight nodes and draw it."""
    plt.rcParams |= {"svg.hashsalt": "method", "svg.fonttype": "path"}
    torch.manual_seed(7)
    adjacent = CandidateEdges.adjacent(BLOCKS)
    graph = NeuralGraph(BLOCKS, num_edges=6, node_function=nn.Tanh(), input_function=False, candidates=adjacent)
    pairs: Edges = [(int(u), int(v)) for u, v in graph.candidates.pairs(torch.arange(graph.num_candidates)).T]
    x, target = torch.randn(64, 3), torch.randn(64, 2)
    weight = graph.candidates.weight
    before: Edges = [(int(u), int(v)) for u, v in graph.edge_index.T]
    (graph(x) - target).square().mean().backward()
    assert weight.grad is not None
    widths = _scaled(pairs, weight, 3)
    pushes = _scaled(pairs, weight.grad, 2)
    hallucinated = [pair for pair in pairs if pair not in before]
    while set(before) == {(int(u), int(v)) for u, v in graph.edge_index.T}:  # a step that is large enough
        with torch.no_grad():
            weight.sub_(0.01 * weight.grad)
    after: Edges = [(int(u), int(v)) for u, v in graph.edge_index.T]

    ax = axes("1. Forward")
    for pair in hallucinated:
        between(ax, pair, linestyle=":", color=HALLUCINATED, linewidth=1.2)
    for pair in before:
        between(ax, pair, end=0.92, style="-|>", color=REAL, linewidth=0.5 + widths[pair])
    finish(ax, "forward", ("the k strongest candidates are real", REAL), ("all others are hallucinated", "#78909c"))

    ax = axes("2. Backward")
    for pair in hallucinated:
        between(ax, pair, linestyle=":", color=HALLUCINATED, linewidth=1.2)
        between(
            ax,
            pair,
            start=0.92,
            end=0.5,
            style="-[,widthB=0.3,lengthB=0",
            color=GRADIENT,
            linewidth=0.6 + pushes[pair],
        )
    for pair in before:
        between(ax, pair, start=0.92, end=0.08, style="-|>", color=GRADIENT, linewidth=0.6 + pushes[pair])
    finish(
        ax,
        "backward",
        ("gradients flow through real edges,", GRADIENT),
        ("to hallucinated ones, not through", GRADIENT),
    )

    ax = axes("3. Next step")
    for pair in set(before) - set(after):
        between(ax, pair, linestyle=":", color=HALLUCINATED, linewidth=1.8)
    for pair in after:
        color = REAL if pair in before else NEW
        between(ax, pair, end=0.92, style="-|>", color=color, linewidth=0.5 + widths[pair])
    finish(ax, "swap", ("a hallucinated edge has grown", NEW), ("and displaces the weakest one", "#78909c"))


if __name__ == "__main__":
    main()
