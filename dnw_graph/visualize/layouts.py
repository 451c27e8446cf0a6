"""The export to networkx, and wirings in its layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dnw_graph._compat import import_pyg
from dnw_graph.arguments import checked, wrong
from dnw_graph.errors import InputError
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.visualize import style
from dnw_graph.visualize.style import Data

if TYPE_CHECKING:
    import matplotlib.axes

Layout = Callable[[Any], Mapping[int, Any]]
"""A function that returns a position ``(x, y)`` for every node of a ``networkx.DiGraph``, like networkx's layouts."""

# Largest number of nodes with numbers.
_MOST_NUMBERS = 80
_NUMBERED, _NODE_SIZE = 240, 60


@checked
def to_networkx(graph: NeuralGraph | Data) -> Any:
    """Return a wiring as a ``networkx.DiGraph``, by way of PyG's ``to_networkx``.

    Every edge carries its ``edge_weight``; every node its ``block``, ``pos``, ``input_mask``, ``output_mask`` and
    ``live_mask``, as in :meth:`~dnw_graph.NeuralGraph.to_data`. Nodes without an edge are included.

    Args:
        graph: A graph, or the result of its ``to_data``.

    Raises:
        InputError: If several edges connect the same two nodes, as in convolutions, or networkx is not installed.
    """
    data = style.to_data(graph)
    if (pairs := data.edge_index.unique(dim=1).size(1)) < data.num_edges:
        raise InputError(
            f"{data.num_edges:,} edges connect {pairs:,} pairs of nodes, and a DiGraph has one edge per pair: "
            "torch_geometric.utils.to_networkx(data, to_multi=True) keeps all of them"
        )
    return _network(data)


def _network(data: Data) -> Any:
    node_attrs = ["block", "pos", "input_mask", "output_mask", "live_mask"]
    edge_attrs = ["edge_weight"] if data.get("edge_weight") is not None else None
    try:
        return import_pyg().utils.to_networkx(data, node_attrs=node_attrs, edge_attrs=edge_attrs)
    except ModuleNotFoundError as error:
        raise InputError("networkx is not installed: pip install 'dnw-graph[train]'") from error


def plot_layout(data: Data, layout: Layout, top: int, ax: matplotlib.axes.Axes | None) -> matplotlib.axes.Axes:
    """Draw the strongest edges of a wiring and their nodes where a layout puts them; see :func:`plot`."""
    weight = data.get("edge_weight")
    edges = (torch.ones(data.num_edges) if weight is None else weight.abs()).argsort()[-top:]
    network = _network(data)
    pairs = [(u, v) for u, v in data.edge_index[:, edges].T.tolist()]
    network.remove_edges_from(set(network.edges) - set(pairs))
    network.remove_nodes_from([node for node, degree in network.degree if not degree])
    places = _places(layout, network)
    ax = style.new_axes(8.0, 6.0) if ax is None else ax
    _draw(ax, data, network, places, pairs, *style.sign_colours(data, edges))
    style.legend_beside(ax, style.sign_lines(data))
    shown = f"\ndrawn: the {len(edges):,} strongest edges and their {len(places):,} nodes"
    ax.set_title(style.title(data) + (shown if len(edges) < data.num_edges else ""), fontsize="medium")
    ax.set_axis_off()
    return ax


def _places(layout: Layout, network: Any) -> dict[int, tuple[float, float]]:
    expected = "a function that returns a position (x, y) for every node"
    found = layout(network)
    try:
        places = {node: tuple(np.asarray(found[node], float)) for node in network}
    except (KeyError, TypeError, ValueError, IndexError):
        raise wrong("layout", expected, found) from None
    if any(len(place) != 2 or not np.isfinite(place).all() for place in places.values()):
        raise wrong("layout", expected, found)
    return places


def _draw(
    ax: matplotlib.axes.Axes,
    data: Data,
    network: Any,
    places: Mapping[int, tuple[float, float]],
    pairs: list[tuple[int, int]],
    colours: list[str],
    opacity: torch.Tensor,
) -> None:
    import networkx as nx
    from matplotlib.colors import to_rgba

    shades = [to_rgba(colour, max(alpha, 0.15)) for colour, alpha in zip(colours, opacity.tolist(), strict=True)]
    # Curves, to distinguish two edges between the same nodes.
    numbered = len(network) <= _MOST_NUMBERS
    size = _NUMBERED if numbered else _NODE_SIZE
    look = {"arrowsize": 10, "node_size": size, "connectionstyle": "arc3,rad=0.08", "width": 1.2}
    nx.draw_networkx_edges(network, places, pairs, ax=ax, edge_color=shades, arrows=True, **look)
    kinds = (
        ("inputs", data.input_mask, "s"),
        ("outputs", data.output_mask & ~data.input_mask, "D"),
        ("other nodes", ~(data.input_mask | data.output_mask), "o"),
    )
    for name, mask, marker in kinds:
        nodes = [node for node in network if mask[node]]
        if nodes:
            x, y = zip(*(places[node] for node in nodes), strict=True)
            faces = [style.LIVE if data.live_mask[node] else "white" for node in nodes]
            ends = [style.LIVE if data.live_mask[node] else style.DEAD for node in nodes]
            ax.scatter(x, y, size, faces, marker=marker, edgecolors=ends, zorder=2)
            ax.scatter([], [], _NODE_SIZE, style.LIVE, marker=marker, label=name)
    if numbered:
        for node, place in places.items():
            colour = "white" if data.live_mask[node] else style.LIVE
            ax.text(*place, str(node), color=colour, ha="center", va="center", fontsize=9, zorder=3)
    if not data.live_mask[list(network)].all():
        ax.scatter([], [], _NODE_SIZE, "white", edgecolors=style.DEAD, label="dead nodes")
    ax.margins(0.05)
