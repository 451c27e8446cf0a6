"""The common style of all pictures: one colour per meaning, titles, and axes; imports matplotlib when needed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dnw_graph._compat import import_pyg
from dnw_graph.arguments import require
from dnw_graph.errors import InputError
from dnw_graph.neural_graph import NeuralGraph

import_pyg()

from torch_geometric.data import Data  # noqa: E402

if TYPE_CHECKING:
    import matplotlib.axes

# Okabe and Ito's colours and Tol's purple, distinguishable with any colour vision. Each has one meaning.
POSITIVE, NEGATIVE = "#0072B2", "#D55E00"
BORN, GONE, KEPT = "#009E73", "#AA3377", "#C4C4C4"
LIVE, DEAD = "#202020", "#B0B0B0"
# For two curves without one of these meanings, and for bands from a wide range of quantiles to a narrow one.
MAIN, SIDE, BANDS = "#000000", "#767676", ("#E3E3E3", "#BABABA")
# For pairs that are not candidates, and for the part of a matrix where edges lead back.
IMPOSSIBLE, FEEDBACK = "#DDDDDD", "#F6F1D5"
# From no real edges among the candidates to many.
DENSITY = ("#FFFFFF", "#D0D0D0", "#7A7A7A", "#303030", "#000000")
# Edges have full colour from this quantile of |w|, so that a single large weight does not make all others pale.
OPAQUE = 0.95
# Opacity of LIVE for edges whose weight is zero or unknown: on white it looks like KEPT.
NO_SIGN = 0.3


def to_data(graph: NeuralGraph | Data, epoch: float | None = None) -> Data:
    """Return a wiring as a PyG graph, at an epoch if one is given."""
    data = graph.to_data() if isinstance(graph, NeuralGraph) else graph
    if epoch is None:
        return data
    data = copy.copy(data)
    data.epoch = epoch
    return data


def is_dynamic(data: Data) -> bool:
    """Whether a graph may have cycles."""
    return data.get("dynamics") not in (None, "Static", "layers")


def num_candidates(data: Data) -> int | None:
    """Return the number of candidate edges, or None if the data lacks it."""
    blocks = candidate_blocks(data)
    if blocks is None:
        return None
    return sum((b - a) * (d - c) for a, b, c, d in blocks) * int(data.get("places") or 1)


def candidate_blocks(data: Data) -> list[list[int]] | None:
    """Return the candidates as blocks, or None if the data lacks them or has lost nodes."""
    blocks = torch.as_tensor(data.get("candidate_blocks", [])).reshape(-1, 4)  # Older files have a tensor.
    return blocks.tolist() if len(blocks) and int(blocks[:, 1::2].max()) <= data.num_nodes else None


def title(data: Data, when: str | None = None) -> str:
    """Return the title of a picture: graph, rule, k and epoch, as far as known.

    Args:
        data: The wiring.
        when: The moment, instead of the one in the data.
    """
    edges, candidates = f"k = {data.num_edges:,}", num_candidates(data)
    if candidates is not None:
        edges += f" of {candidates:,} candidates ({share(data.num_edges / candidates)})"
    parts = [data.get("rule"), edges, when or moment(data)]
    return ": ".join(filter(None, (data.get("name"), ", ".join(filter(None, parts)))))


def share(value: float) -> str:
    """Return a share as a percentage of two significant digits."""
    return "0" if value == 0 else f"{100 * value:.0f}%" if value >= 0.0995 else f"{100 * value:.2g}%"


def moment(data: Data) -> str | None:
    """Return the moment of a wiring in words, if the data has it."""
    if (epoch := data.get("epoch")) is not None:
        return f"epoch {float(epoch):.1f}".removesuffix(".0")  # Of a batch it is a tensor.
    return None if (step := data.get("step")) is None else f"step {int(step):,}"


def block_names(data: Data) -> list[str]:
    """Return the names of the blocks of nodes."""
    last, outputs = int(data.block.max()), data.get("output_mask")
    if last == 0:
        return ["all"]
    whole = outputs is None or outputs.any()
    return ["inputs", *(f"block {number}" for number in range(1, last)), "outputs" if whole else f"block {last}"]


def groups(sizes: Sequence[int]) -> list[range]:
    """Return the index ranges of consecutive groups."""
    return [range(*ends) for ends in pairwise(accumulate(sizes, initial=0))]


def pyplot() -> Any:
    """Return matplotlib's interface for new figures."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise InputError("pictures need matplotlib, which is not installed: pip install 'dnw-graph[train]'") from error
    return plt


def figure(width: float, height: float) -> Any:
    """Return a figure that pyplot does not manage, so that it is freed like any object."""
    pyplot()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def check_axes(ax: object) -> None:
    """Refuse anything but axes or None."""
    if ax is not None:
        pyplot()
        from matplotlib.axes import Axes

        require(isinstance(ax, Axes), "ax", "axes of matplotlib", ax)


def new_axes(width: float, height: float) -> matplotlib.axes.Axes:
    """Return the axes of a new figure."""
    axes: matplotlib.axes.Axes = pyplot().subplots(figsize=(width, height), layout="constrained")[1]
    return axes


def shades(count: int) -> list[str]:
    """Return greys from dark to light, one per block: an order, not a meaning."""
    return [
        f"#{level:02x}{level:02x}{level:02x}" for level in (60 + 150 * n // max(1, count - 1) for n in range(count))
    ]


def legend_above(ax: matplotlib.axes.Axes, lines: Sequence[tuple[str, str, Any]], note: str) -> None:
    """Put a legend in one row above axes: colour, label and dashes of lines, and a note as its title."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=label, linestyle=dashes) for colour, label, dashes in lines]
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(handles)}
    ax.legend(handles=handles, title=note, frameon=False, **place)


def depths(data: Data) -> Int[Tensor, " nodes"]:
    """Return the distance of each node from the nearest input in edges; -1 if no path leads to it."""
    depth = torch.where(data.input_mask, 0, -1)
    source, target = data.edge_index
    for now in range(data.num_nodes):
        new = target[depth[source] == now]
        new = new[depth[new] < 0]
        if not len(new):
            break
        depth[new] = now + 1
    return depth


def legend_beside(ax: matplotlib.axes.Axes, lines: Sequence[tuple[str, str, Any]]) -> None:
    """Put a legend to the right of the axes: colour, label and dashes of lines, then the nodes."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=label, linestyle=dashes) for colour, label, dashes in lines]
    nodes, _ = ax.get_legend_handles_labels()
    ax.legend(handles=[*handles, *nodes], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def full_colour(data: Data) -> float:
    """Return the |w| from which edges have full colour."""
    large = np.quantile(data.edge_weight.abs().float().numpy(), OPAQUE) if data.num_edges else 0.0
    return max(float(large), 1e-12)


def sign_colours(data: Data, edges: Int[Tensor, " edges"]) -> tuple[list[str], Tensor]:
    """Return colours for the signs of weights, and opacities for their magnitudes."""
    if data.get("edge_weight") is None:
        return [LIVE] * len(edges), torch.full((len(edges),), NO_SIGN)
    weight = data.edge_weight[edges]
    opacity = (weight.abs() / full_colour(data)).sqrt().clamp(max=1.0)
    colours = [POSITIVE if w > 0 else NEGATIVE if w < 0 else LIVE for w in weight.tolist()]
    return colours, torch.where(weight == 0, NO_SIGN, opacity)


def sign_lines(data: Data) -> list[tuple[str, str, Any]]:
    """Return the legend entries of the edges: colour, label and dashes."""
    if data.get("edge_weight") is None:
        return [(KEPT, f"edges: {data.num_edges:,}", "-")]
    positive, negative = int((data.edge_weight > 0).sum()), int((data.edge_weight < 0).sum())
    lines: list[tuple[str, str, Any]] = [
        (POSITIVE, f"edges with w > 0: {positive:,}", "-"),
        (NEGATIVE, f"edges with w < 0: {negative:,}", "-"),
    ]
    zero = data.num_edges - positive - negative
    return [*lines, (KEPT, f"edges with w = 0: {zero:,}", "-")] if zero else lines
