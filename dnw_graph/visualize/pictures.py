"""Pictures of wirings, and the way to networkx.

matplotlib and networkx come with the extra ``dnw-graph[train]`` and are imported only where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dnw_graph._compat import import_pyg
from dnw_graph.arguments import checked, require
from dnw_graph.errors import InputError
from dnw_graph.neural_graph import NeuralGraph

import_pyg()

from torch_geometric import utils  # noqa: E402
from torch_geometric.data import Data  # noqa: E402

if TYPE_CHECKING:
    import matplotlib.axes

# Okabe and Ito's colours, which are told apart with any kind of colour vision.
POSITIVE = ADDED = "#0072B2"
NEGATIVE = REMOVED = "#D55E00"
KEPT = "#C4C4C4"
LIVE, DEAD = "#202020", "#B0B0B0"
IMPOSSIBLE = "#E4E4E4"

# Nodes are ticks in columns of more nodes than this, where circles would touch.
_MOST_CIRCLES = 80
# Up to this many edges are drawn as broad lines.
_FEW_EDGES = 200
# Adjacency matrices of more nodes than this are binned to about as many cells as the second number, either way.
_MOST_CELLS, _BINNED_CELLS = 400, 128
# Points of a curve from one column to the next.
_STEPS = 24


@checked
def plot(graph: NeuralGraph | Data, top: int = 1000, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
    """Draw a wiring: nodes in one column per block, from inputs to outputs, and the strongest real edges.

    Blue edges have a positive weight, orange ones a negative one. The opacity of an edge is √(|w| / max |w|).
    Dead nodes are hollow or, in large graphs, pale. Title and legend give the counts.

    In a graph with cycles, an edge within a block bulges to the right and a self-loop is a short line. Such edges have
    a direction that only :func:`plot_adjacency` shows.

    Args:
        graph: A graph, or what its :meth:`~dnw_graph.NeuralGraph.to_data` returned. For a graph within a model, set
            ``data.live_mask`` to its entry of :func:`dnw_graph.analysis.cost.live_nodes` to see what is dead there.
        top: How many edges to draw at most, those of largest |w|.
        ax: Where to draw. Default: a new figure of a size that fits the graph.

    Returns:
        The axes; ``ax.figure.savefig("wiring.png")`` writes the picture.

    Raises:
        InputError: If ``top`` is less than 1 or matplotlib is not installed.
    """
    _check_axes(ax)
    data = _to_data(graph)
    edges = _strongest(data, torch.arange(data.num_edges), top)
    ax = _new_axes(data) if ax is None else ax
    weight = data.edge_weight[edges]
    opacity = (weight.abs() / weight.abs().max().clamp(min=1e-12)).sqrt()
    _draw_edges(ax, data, edges, [POSITIVE if w > 0 else NEGATIVE for w in weight.tolist()], opacity)
    _draw_nodes(ax, data)
    positive = int((data.edge_weight > 0).sum())
    labels = f"edges with w > 0: {positive:,}", f"edges with w < 0: {data.num_edges - positive:,}"
    _draw_legend(ax, (POSITIVE, NEGATIVE), labels)
    shown = f", the {top:,} of largest |w| drawn" if top < data.num_edges else ""
    ax.set_title(f"{data.num_nodes:,} nodes, {data.num_edges:,} real edges{shown}")
    return ax


@checked
def plot_change(
    before: Data, after: Data, top: int = 1000, ax: matplotlib.axes.Axes | None = None
) -> matplotlib.axes.Axes:
    """Draw which real edges of a graph were kept, removed and added.

    Args:
        before: What :meth:`~dnw_graph.NeuralGraph.to_data` returned at an earlier moment.
        after: What it returned at a later moment; the dead nodes shown are those of this moment.
        top: How many edges of each kind to draw at most, those of largest |w|.
        ax: Where to draw. Default: a new figure of a size that fits the graph.

    Returns:
        The axes.

    Raises:
        InputError: If they are graphs, which know their edges of now alone; if the blocks of the two differ, ``top`` is
            less than 1 or matplotlib is not installed.
    """
    _check_axes(ax)
    if not torch.equal(before.block, after.block):
        sizes = [data.block.bincount().tolist() for data in (before, after)]
        raise InputError(
            f"before and after must be one graph at two moments; their blocks have {sizes[0]} and {sizes[1]} nodes"
        )
    old, new = (data.edge_index[0] * data.num_nodes + data.edge_index[1] for data in (before, after))
    kinds = (
        ("kept", KEPT, after, torch.isin(new, old)),
        ("removed", REMOVED, before, ~torch.isin(old, new)),
        ("added", ADDED, after, ~torch.isin(new, old)),
    )
    chosen = [_strongest(data, mask.nonzero().flatten(), top) for _, _, data, mask in kinds]
    ax = _new_axes(after) if ax is None else ax
    for (_, colour, data, _), edges in zip(kinds, chosen, strict=True):
        opacity = torch.full((len(edges),), 0.7 if len(edges) <= _FEW_EDGES else 0.4)
        _draw_edges(ax, data, edges, [colour] * len(edges), opacity)
    _draw_nodes(ax, after)
    labels = [f"edges {name}: {int(mask.sum()):,}" for name, _, _, mask in kinds]
    _draw_legend(ax, [colour for _, colour, _, _ in kinds], labels)
    shown = f", at most {top:,} of a kind drawn" if any(int(mask.sum()) > top for *_, mask in kinds) else ""
    ax.set_title(f"{after.num_nodes:,} nodes, {after.num_edges:,} real edges{shown}")
    return ax


@checked
def plot_adjacency(graph: NeuralGraph, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
    """Draw the adjacency matrix: targets downwards, sources across, lines between the blocks.

    Pairs that are no candidates are grey. In a graph of at most 400 nodes a cell is a pair of nodes: white if no edge
    is real, blue for a positive and orange for a negative weight, the darker the larger √|w|. In a larger graph a cell
    is a square of pairs, coloured by the share of its candidates that is real.

    Args:
        graph: The graph.
        ax: Where to draw. Default: a new figure.

    Returns:
        The axes.

    Raises:
        InputError: If it is no graph, or matplotlib is not installed.
    """
    _check_axes(ax)
    ax = _pyplot().subplots(figsize=(7.5, 6.5), layout="constrained")[1] if ax is None else ax
    from matplotlib.colors import FuncNorm, LinearSegmentedColormap, ListedColormap

    data = graph.to_data()
    side = 1 if graph.num_nodes <= _MOST_CELLS else math.ceil(graph.num_nodes / _BINNED_CELLS)
    candidates = _candidates_per_cell(graph, side)
    source, target = data.edge_index // side
    cells: Tensor
    scale: dict[str, Any]
    if side == 1:
        cells = torch.full_like(candidates, math.nan)
        cells[target, source] = data.edge_weight.float()
        largest = float(data.edge_weight.abs().max())
        # A step at zero: the weakest real edge still differs from white.
        steps = [(0, NEGATIVE), (0.5, "#F7CFB2"), (0.5, "#B5D7EC"), (1, POSITIVE)]
        colours = LinearSegmentedColormap.from_list("sign", steps)
        root = (lambda w: np.sign(w) * np.sqrt(np.abs(w)), lambda root: np.sign(root) * root**2)
        scale = {"cmap": colours, "norm": FuncNorm(root, vmin=-largest, vmax=largest)}
        label, extend = "weight of a real edge", "neither"
    else:
        cells = torch.zeros_like(candidates).index_put_((target, source), torch.ones(len(source)), accumulate=True)
        cells /= candidates
        scale = {"cmap": "magma_r", "vmin": 0, "vmax": float(cells[candidates > 0].quantile(0.99))}
        label, extend = f"real share of the candidates in a cell of {side} × {side} pairs", "max"
    reach = len(cells) * side
    placed: dict[str, Any] = {"extent": (0, reach, reach, 0), "interpolation": "nearest", "aspect": "auto"}
    impossible = torch.where(candidates > 0, math.nan, 1.0)
    ax.imshow(impossible.numpy(), cmap=ListedColormap([IMPOSSIBLE]), **placed)
    image = ax.imshow(cells.numpy(), **scale, **placed)
    ax.figure.colorbar(image, ax=ax, label=label, extend=extend, shrink=0.7)
    bounds = [0, *accumulate(data.block.bincount().tolist())]
    middles = [(start + stop) / 2 for start, stop in pairwise(bounds)]
    for bound in bounds:
        ax.axhline(bound, color=LIVE, linewidth=0.5)
        ax.axvline(bound, color=LIVE, linewidth=0.5)
    ax.set_xticks(middles, _block_names(len(middles)))
    ax.set_yticks(middles, _block_names(len(middles)))
    ax.tick_params(length=0)
    blocks = graph.candidates.blocks
    ax.set_xlim(min(block.sources.start for block in blocks), max(block.sources.stop for block in blocks))
    ax.set_ylim(max(block.targets.stop for block in blocks), min(block.targets.start for block in blocks))
    ax.set_xlabel("source")
    ax.set_ylabel("target")
    ax.set_title(f"{graph.num_real_edges:,} of {graph.num_candidates:,} candidate edges are real")
    return ax


def _candidates_per_cell(graph: NeuralGraph, side: int) -> Float[Tensor, "cells cells"]:
    """Count the candidate edges in every square of side × side pairs of nodes, targets × sources."""
    start = torch.arange(0, graph.num_nodes, side)

    def overlap(nodes: range) -> Tensor:
        return ((start + side).clamp(max=nodes.stop) - start.clamp(min=nodes.start)).clamp(min=0)

    blocks = graph.candidates.blocks
    return torch.stack([torch.outer(overlap(block.targets), overlap(block.sources)) for block in blocks]).sum(0).float()


@checked
def to_networkx(graph: NeuralGraph | Data) -> Any:
    """Return a wiring as a ``networkx.DiGraph``, by way of PyG's ``to_networkx``.

    Every edge carries its ``edge_weight``; every node its ``block``, ``pos``, ``input_mask``, ``output_mask`` and
    ``live_mask``, as in :meth:`~dnw_graph.NeuralGraph.to_data`. Nodes without an edge are included.

    Args:
        graph: A graph, or what its ``to_data`` returned.

    Raises:
        InputError: If networkx is not installed.
    """
    node_attrs = ["block", "pos", "input_mask", "output_mask", "live_mask"]
    try:
        return utils.to_networkx(_to_data(graph), node_attrs=node_attrs, edge_attrs=["edge_weight"])
    except ModuleNotFoundError as error:
        raise InputError("networkx is not installed: pip install 'dnw-graph[train]'") from error


def _check_axes(ax: object) -> None:
    if ax is not None:
        _pyplot()
        from matplotlib.axes import Axes

        require(isinstance(ax, Axes), "ax", "axes of matplotlib", ax)


def _to_data(graph: NeuralGraph | Data) -> Data:
    return graph.to_data() if isinstance(graph, NeuralGraph) else graph


def _strongest(data: Data, edges: Int[Tensor, " edges"], top: int) -> Int[Tensor, " chosen"]:
    """Return the ``top`` of some edges that have the largest |w|, in ascending order: the strongest is drawn last."""
    require(top >= 1, "top", "the largest number of edges to draw, an integer from 1 up", top)
    return edges[data.edge_weight[edges].abs().argsort()[-top:]]


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise InputError("pictures need matplotlib, which is not installed: pip install 'dnw-graph[train]'") from error
    return plt


def _new_axes(data: Data) -> matplotlib.axes.Axes:
    sizes = data.block.bincount()
    width = min(max(8.0, 2.0 * len(sizes)), 14.0)
    height = min(max(3.5, 0.13 * int(sizes.max())), 8.0)
    return _pyplot().subplots(figsize=(width, height), layout="constrained")[1]


def _block_names(count: int) -> list[str]:
    return ["inputs", *(f"block {number}" for number in range(1, count - 1)), "outputs"] if count > 1 else ["all"]


def _draw_edges(
    ax: matplotlib.axes.Axes, data: Data, edges: Int[Tensor, " edges"], colours: list[str], opacity: Tensor
) -> None:
    """Draw edges as one collection of curves."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    within = (data.block[data.edge_index[0, edges]] == data.block[data.edge_index[1, edges]]).tolist()
    curves = zip(_curves_between_blocks(data, edges).numpy(), _curves_within_block(data, edges).numpy(), strict=True)
    lines = LineCollection(
        [bulge if inside else route for (route, bulge), inside in zip(curves, within, strict=True)],
        colors=[to_rgba(colour, alpha) for colour, alpha in zip(colours, opacity.tolist(), strict=True)],
        linewidths=1.4 if len(edges) <= _FEW_EDGES else 0.7,
        zorder=1,
    )
    ax.add_collection(lines)


def _curves_between_blocks(data: Data, edges: Int[Tensor, " edges"]) -> Float[Tensor, "edges points 2"]:
    """Return curves that are level at every column and pass between the nodes of the blocks that they skip.

    At a skipped block a curve goes through the multiple of 1 / size that is nearest to the straight line.
    """
    sizes = data.block.bincount()
    source, target = data.edge_index[:, edges]
    first, last = data.block[source, None], data.block[target, None]
    y_first, y_last = data.pos[source, 1:], data.pos[target, 1:]
    column = torch.arange(len(sizes)).clamp(torch.minimum(first, last), torch.maximum(first, last))
    straight = y_first + (y_last - y_first) * (column - first) / (last - first)
    gap = (straight * sizes[column]).round() / sizes[column]
    y = torch.where(column == first, y_first, torch.where(column == last, y_last, gap))
    x = data.pos[sizes.cumsum(0)[column] - 1, 0]
    t = torch.arange(_STEPS) / _STEPS
    return torch.stack([_between_columns(x, t), _between_columns(y, t * t * (3 - 2 * t))], dim=-1)


def _between_columns(
    values: Float[Tensor, "edges columns"], share: Float[Tensor, " steps"]
) -> Float[Tensor, "edges points"]:
    """Return values on the way from each column to the next: given shares of the way, then the last column."""
    ways = values[:, :-1, None] + values.diff(dim=1).unsqueeze(2) * share
    return torch.cat([ways.flatten(1), values[:, -1:]], dim=1)


def _curves_within_block(data: Data, edges: Int[Tensor, " edges"]) -> Float[Tensor, "edges points 2"]:
    """Return curves that bulge to the right of their block: the farther, the more; a self-loop is a short line."""
    start, stop = data.pos[data.edge_index[:, edges]].unsqueeze(2)
    t = torch.linspace(0, 1, 2 * _STEPS)
    way = stop - start
    bulge = (0.05 + 0.4 * way[..., 1].abs() / max(int(data.block.max()), 1)) * 4 * t * (1 - t)
    line = start + way * t.unsqueeze(1)
    return torch.stack([line[..., 0] + bulge, line[..., 1]], dim=-1)


def _draw_nodes(ax: matplotlib.axes.Axes, data: Data) -> None:
    """Draw nodes as circles, or as ticks where circles would touch, and label the columns."""
    sizes = data.block.bincount().tolist()
    pitch = 72 * ax.bbox.height / ax.figure.dpi / max(sizes)
    style: dict[str, Any]
    for name, mask, edge, face in (("live", data.live_mask, LIVE, LIVE), ("dead", ~data.live_mask, DEAD, "white")):
        if max(sizes) <= _MOST_CIRCLES:
            style = {"s": min(0.7 * pitch, 8.0) ** 2, "facecolors": face, "edgecolors": edge}
        else:
            style = {"s": 100, "marker": "_", "color": edge, "linewidths": 0.7 * pitch}
        x, y = data.pos[mask].T.numpy()
        ax.scatter(x, y, label=f"{name} nodes: {int(mask.sum()):,}", zorder=2, **style)
    labels = [f"{name}\n{size:,} nodes" for name, size in zip(_block_names(len(sizes)), sizes, strict=True)]
    ax.set_xticks(data.pos[:, 0].unique().tolist(), labels)
    ax.set_yticks([])
    ax.set_ylim(1.01, -0.01)
    ax.margins(x=0.03)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _draw_legend(ax: matplotlib.axes.Axes, colours: Sequence[str], labels: Sequence[str]) -> None:
    """Put a legend to the right of the axes: the given lines, then the nodes."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, label=label) for colour, label in zip(colours, labels, strict=True)]
    nodes, _ = ax.get_legend_handles_labels()
    ax.legend(handles=[*lines, *nodes], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
