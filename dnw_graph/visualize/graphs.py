"""Wirings as nodes and edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dnw_graph.arguments import checked, require
from dnw_graph.errors import InputError
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.visualize import style
from dnw_graph.visualize.layouts import Layout, plot_layout
from dnw_graph.visualize.matrices import arrange, plot_adjacency
from dnw_graph.visualize.style import Data

if TYPE_CHECKING:
    import matplotlib.axes

# In columns of more nodes than this, circles would touch, so nodes are ticks.
_MOST_CIRCLES = 80
# Up to this many edges are drawn as broad lines. More edges of a layer, or of a graph with cycles, become a matrix.
_FEW_EDGES = 200
# Approximate minimum number of gaps at which curves can pass a column.
_GAPS = 9
# Drawing order of the parts of a change.
_LAYERS = {"gone": 1.0, "kept": 1.1, "born": 1.2}
# Points of a curve between adjacent columns.
_STEPS = 24


@checked
def plot(
    graph: NeuralGraph | Data,
    top: int = 400,
    ax: matplotlib.axes.Axes | None = None,
    epoch: float | None = None,
    layout: Layout | None = None,
) -> matplotlib.axes.Axes:
    """Draw a wiring: nodes in columns from inputs to outputs, and the real edges between them.

    Blue edges have a positive weight, orange ones a negative one, grey ones are zero. The opacity of an edge is
    √(|w| / q), at most 1; q is the 95th percentile of |w|. Dead nodes are hollow or, in large graphs, pale. Title and
    legend give the counts.

    If the graph has more than ``top`` real edges, the same share of the edges between any two blocks is drawn, those of
    largest |w|, so that no pair of blocks looks emptier than it is. A line below the title gives the share.

    A graph with cycles has a column for every distance from the inputs (the number of edges from the nearest input),
    outputs last. Edges to a later column are solid; those that lead back or stay (feedback) are dashed, and bulge to
    the right within a column. If such a graph or a sparse layer has more than 200 edges, :func:`plot_adjacency` draws
    it.

    With a ``layout`` of networkx, edges are arrows. ``nx.kamada_kawai_layout`` shows which nodes of a small graph with
    cycles belong together; ``partial(nx.multipartite_layout, subset_key="block")`` shows the strongest edges of a large
    graph by block. The ``top`` edges of largest |w| and their nodes are drawn.

    Args:
        graph: A graph, or the result of its :meth:`~dnw_graph.NeuralGraph.to_data`. For a graph within a model, set
            ``data.live_mask`` to its entry of :func:`dnw_graph.analysis.cost.live_nodes` to see which nodes are dead
            there.
        top: Largest number of edges to draw; without a layout, at least one between any two connected blocks.
        ax: Where to draw. Default: a new figure of a size that fits the graph.
        epoch: Number of epochs so far, for the title. Default: that of the data, as from a recording.
        layout: A layout of networkx, or any function of a ``networkx.DiGraph`` that returns a position ``(x, y)`` for
            every node.

    Returns:
        The axes; ``ax.figure.savefig("wiring.png")`` writes the picture.

    Raises:
        InputError: If ``top`` is less than 1, the layout lacks a node, or matplotlib or networkx is not installed.
    """
    style.check_axes(ax)
    _check_top(top)
    data = style.to_data(graph, epoch)
    if layout is not None:
        return plot_layout(data, layout, top, ax)
    if (style.is_dynamic(data) or data.get("dynamics") == "layers") and data.num_edges > _FEW_EDGES:
        return plot_adjacency(data, ax)
    data, names, back = _in_columns(data)
    edges = _strongest(data, torch.arange(data.num_edges), top)
    ax = _new_axes(data) if ax is None else ax
    draw_edges(ax, data, edges, *style.sign_colours(data, edges), dashed=back)
    draw_nodes(ax, data, names)
    lines = style.sign_lines(data)
    if back.any():
        lines += [
            (style.LIVE, f"forward: {int((~back).sum()):,}", "-"),
            (style.LIVE, f"feedback: {int(back.sum()):,}", "--"),
        ]
    style.legend_beside(ax, lines)
    shown = ""
    if top < data.num_edges:
        shown = f"\ndrawn: the strongest {style.share(top / data.num_edges)} of the edges between any two blocks"
    ax.set_title(style.title(data) + shown, fontsize="medium")
    return ax


@checked
def plot_change(
    before: Data, after: Data, top: int = 400, ax: matplotlib.axes.Axes | None = None
) -> matplotlib.axes.Axes:
    """Draw the real edges of a graph that were kept, born and gone between two moments.

    Edges born are green, edges gone dashed purple, and kept ones grey. An edge of a convolution is one position in the
    kernel between two channels.

    Args:
        before: The result of :meth:`~dnw_graph.NeuralGraph.to_data` at an earlier moment, or a moment of a recording.
        after: The same at a later moment; the dead nodes shown are those of this moment.
        top: Largest number of edges of each kind to draw; the same share between any two blocks, as in :func:`plot`.
        ax: Where to draw. Default: a new figure of a size that fits the graph.

    Returns:
        The axes.

    Raises:
        InputError: If they are graphs, which have only their present edges; if their blocks differ, ``top`` is less
            than 1 or matplotlib is not installed.
    """
    style.check_axes(ax)
    _check_top(top)
    if not torch.equal(before.block, after.block):
        sizes = [data.block.bincount().tolist() for data in (before, after)]
        raise InputError(
            f"before and after must be one graph at two moments; their blocks have {sizes[0]} and {sizes[1]} nodes"
        )
    both = torch.cat([_identities(before), _identities(after)]).unique(dim=0, return_inverse=True)[1]
    old, new = both.split([before.num_edges, after.num_edges])
    kinds = (
        ("kept", style.KEPT, after, torch.isin(new, old)),
        ("gone", style.GONE, before, ~torch.isin(old, new)),
        ("born", style.BORN, after, ~torch.isin(new, old)),
    )
    chosen = [_strongest(data, mask.nonzero().flatten(), top) for _, _, data, mask in kinds]
    ax = _new_axes(after) if ax is None else ax
    for (name, colour, data, _), edges in zip(kinds, chosen, strict=True):
        opacity = torch.full((len(edges),), 0.8 if len(edges) <= 2 * _FEW_EDGES else 0.5)
        dashed = torch.full((data.num_edges,), name == "gone")
        lines = draw_edges(ax, data, edges, [colour] * len(edges), opacity, dashed)
        lines.set_zorder(_LAYERS[name])
    draw_nodes(ax, after, style.block_names(after))
    counts = [int(mask.sum()) for *_, mask in kinds]
    style.legend_beside(
        ax,
        [
            (colour, f"edges {name}: {count:,}", "--" if name == "gone" else "-")
            for (name, colour, *_), count in zip(kinds, counts, strict=True)
        ],
    )
    ends = [style.moment(data) for data in (before, after)]
    when = " to ".join(filter(None, ends)) if all(ends) else None
    drawn = [style.share(min(1.0, top / count)) for count in counts if count]
    shown = f"\ndrawn: the strongest {', '.join(drawn)} of them between any two blocks" if max(counts) > top else ""
    ax.set_title(style.title(after, when) + shown, fontsize="medium")
    return ax


def _check_top(top: int) -> None:
    require(top >= 1, "top", "the largest number of edges to draw, an integer >= 1", top)


def _identities(data: Data) -> Int[Tensor, "edges parts"]:
    """Return what tells edges apart: source, target and, in convolutions, the position in the kernel."""
    place = data.get("kernel_position")
    place = data.edge_index.new_zeros(data.num_edges, 3) if place is None else place
    return torch.cat([data.edge_index.T, place], dim=1)


def _magnitude(data: Data) -> Tensor:
    weight = data.get("edge_weight")
    return torch.ones(data.num_edges) if weight is None else weight.abs()


def _strongest(data: Data, edges: Int[Tensor, " edges"], top: int) -> Int[Tensor, " chosen"]:
    """Return the same share of some edges between any two blocks, about ``top`` in total, weak ones first.

    They are those of largest |w|; between two blocks with an edge at least one.
    """
    edges = edges[_magnitude(data)[edges].argsort()]
    if len(edges) <= top:
        return edges
    blocks = data.block[data.edge_index[:, edges]]
    pair = blocks[0] * (int(data.block.max()) + 1) + blocks[1]
    chosen = []
    for each in pair.unique():
        among = (pair == each).nonzero().flatten()
        chosen.append(among[-max(1, len(among) * top // len(edges)) :])
    return edges[torch.cat(chosen).sort().values]


def _in_columns(data: Data) -> tuple[Data, list[str], Tensor]:
    """Return a wiring with its nodes in columns, the names of the columns, and which edges lead back or stay."""
    if not style.is_dynamic(data):
        return data, style.block_names(data), torch.zeros(data.num_edges, dtype=torch.bool)
    arrangement, data = arrange(data), data.clone()
    sizes = torch.tensor(arrangement.sizes)
    column = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    place = torch.cat([(torch.arange(size) + 0.5) / size for size in arrangement.sizes])
    data.block[arrangement.order] = column
    data.pos[arrangement.order] = torch.stack([column / max(1, len(sizes) - 1), place], dim=1)
    source, target = data.block[data.edge_index]
    return data, list(arrangement.names), target <= source


def _new_axes(data: Data) -> matplotlib.axes.Axes:
    sizes = data.block.bincount()
    return style.new_axes(min(max(8.0, 2.0 * len(sizes)), 14.0), min(max(3.5, 0.13 * int(sizes.max())), 8.0))


def draw_edges(
    ax: matplotlib.axes.Axes,
    data: Data,
    edges: Int[Tensor, " edges"],
    colours: Sequence[str],
    opacity: Tensor,
    dashed: Tensor,
) -> Any:
    """Draw edges as one collection of curves.

    Args:
        ax: Where to draw.
        data: The wiring.
        edges: Which edges.
        colours: Their colours.
        opacity: Their opacities.
        dashed: Which of all edges are dashed.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    lines = LineCollection(
        curves(data, edges),
        colors=[to_rgba(colour, alpha) for colour, alpha in zip(colours, opacity.tolist(), strict=True)],
        linewidths=1.4 if len(edges) <= _FEW_EDGES else 0.7,
        linestyles=[(0, (3, 2)) if dash else "-" for dash in dashed[edges].tolist()],
        zorder=1,
    )
    ax.add_collection(lines)
    return lines


def curves(data: Data, edges: Int[Tensor, " edges"]) -> list[Any]:
    """Return the curve of each of some edges, ``[points, 2]``."""
    within = (data.block[data.edge_index[0, edges]] == data.block[data.edge_index[1, edges]]).tolist()
    both = zip(_curves_between_blocks(data, edges).numpy(), _curves_within_block(data, edges).numpy(), strict=True)
    return [bulge if inside else route for (route, bulge), inside in zip(both, within, strict=True)]


def _curves_between_blocks(data: Data, edges: Int[Tensor, " edges"]) -> Float[Tensor, "edges points 2"]:
    """Return curves that are level at every column and pass between the nodes of the blocks that they skip.

    At a skipped block a curve passes through the gap between two nodes that is nearest to the straight line.
    """
    _, block, sizes = data.block.unique(return_inverse=True, return_counts=True)  # A part may have lost a block.
    source, target = data.edge_index[:, edges]
    first, last = block[source, None], block[target, None]
    y_first, y_last = data.pos[source, 1:], data.pos[target, 1:]
    column = torch.arange(len(sizes)).clamp(torch.minimum(first, last), torch.maximum(first, last))
    straight = y_first + (y_last - y_first) * (column - first) / (last - first)
    # With few nodes there are additional gaps: an odd multiple never coincides with a node.
    places = sizes * ((_GAPS // sizes).clamp(min=1) - 1).div(2, rounding_mode="floor").mul(2).add(1)
    gap = (straight * places[column]).round() / places[column]
    y = torch.where(column == first, y_first, torch.where(column == last, y_last, gap))
    x = data.pos[:, 0].unique()[column]
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


def draw_nodes(ax: matplotlib.axes.Axes, data: Data, names: Sequence[str]) -> None:
    """Draw nodes as circles, or as ticks where circles would touch, and label the columns."""
    sizes = data.block.bincount().tolist()
    pitch = 72 * ax.bbox.height / ax.figure.dpi / max(sizes)
    kinds = (("live", data.live_mask, style.LIVE, style.LIVE), ("dead", ~data.live_mask, style.DEAD, "white"))
    look: dict[str, Any]
    for name, mask, edge, face in kinds:
        if max(sizes) <= _MOST_CIRCLES:
            look = {"s": min(0.7 * pitch, 8.0) ** 2, "facecolors": face, "edgecolors": edge}
        else:
            look = {"s": 100, "marker": "_", "color": edge, "linewidths": pitch}
        x, y = data.pos[mask].T.numpy()
        ax.scatter(x, y, label=f"{name} nodes: {int(mask.sum()):,}", zorder=2, **look)
    labels = [f"{name}\n{size:,} node{'s' * (size != 1)}" for name, size in zip(names, sizes, strict=True) if size]
    ax.set_xticks(data.pos[:, 0].unique().tolist(), labels)
    ax.set_yticks([])
    ax.set_ylim(1.01, -0.01)
    ax.margins(x=0.03)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
