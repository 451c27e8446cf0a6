"""Wirings as matrices of targets × sources: which pairs are edges, and how densely blocks are connected."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.sparse_layers import to_data as layer_data
from dnw_graph.sparse_layers.access import sparse_weights
from dnw_graph.visualize import style
from dnw_graph.visualize.style import Data

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

# In graphs with up to this many nodes, a cell is one pair.
_MOST_NODES = 400
# At most about so many cells, either way, in larger ones, and about so many real edges in a cell on average: with fewer
# the picture shows chance alone.
_CELLS, _EDGES = 128, 16
# Groups of less than this share of the nodes have no room for numbers, nor for a name that lies across.
_NARROW = 0.065


@dataclass(frozen=True)
class Arrangement:
    """Nodes in the order of a picture, in groups.

    Attributes:
        order: The nodes in their order.
        sizes: Number of nodes of each group.
        names: Names of the groups.
    """

    order: Int[Tensor, " nodes"]
    sizes: tuple[int, ...]
    names: tuple[str, ...]


def arrange(data: Data) -> Arrangement:
    """Return the nodes block by block; those of a graph with cycles by their distance from the inputs.

    Within a distance, nodes lie by the mean place of their sources, so that edges lie near the diagonal.
    """
    if not style.is_dynamic(data):
        sizes = data.block.bincount().tolist()
        return Arrangement(torch.arange(data.num_nodes), tuple(sizes), tuple(style.block_names(data)))
    rank, last = _ranks(data)
    place = torch.arange(data.num_nodes).double()
    source, target = data.edge_index
    for _ in range(4):
        into = target.bincount(minlength=data.num_nodes)
        mean = target.bincount(place[source], minlength=data.num_nodes) / into
        mean = torch.where(into > 0, mean, place)
        order = torch.from_numpy(np.lexsort((mean.numpy(), rank.numpy())))
        place[order] = torch.arange(data.num_nodes).double()
    counts = rank.bincount(minlength=last + 1).tolist()
    names = ["no path", "inputs", *(f"after {n}" for n in range(1, last - 1)), "outputs"]
    there = [number for number, count in enumerate(counts) if count]
    return Arrangement(order, tuple(counts[n] for n in there), tuple(names[n] for n in there))


def _ranks(data: Data) -> tuple[Int[Tensor, " nodes"], int]:
    """Return the groups of the nodes of a graph with cycles, and the last one, that of the outputs.

    Nodes without a path from an input are in group 0, inputs in 1, and others as many groups later as the path has
    edges.
    """
    depth = style.depths(data)
    last = int(depth.max()) + 2
    return torch.where(data.output_mask & ~data.input_mask, last, depth + 1), last


@checked
def plot_adjacency(
    graph: NeuralGraph | Data, ax: matplotlib.axes.Axes | None = None, epoch: float | None = None
) -> matplotlib.axes.Axes:
    """Draw the adjacency matrix: targets downwards, sources across, lines between the blocks.

    In a graph of at most 400 nodes a cell is a pair of nodes: white without a real edge, blue for a positive, orange
    for a negative and grey for a zero weight, darker for a larger √|w|. In a larger graph, and if weights are unknown,
    a cell is a rectangle of pairs within one block; it is darker the more of its candidates are real. The number in a
    block is the share of its candidates that are real. Pairs that are not candidates are hatched.

    The nodes of a graph with cycles are ordered by the number of edges from the nearest input (``after 1``, ``after 2``
    …), outputs last; ``no path`` leads to the first ones. Edges below the diagonal blocks lead forward; those on and
    above them, on yellow where a cell is a pair, lead back or stay: feedback.

    Args:
        graph: A graph, or the PyG data of a graph, a layer or a moment of a recording.
        ax: Where to draw. Default: a new figure.
        epoch: Number of epochs so far, for the title. Default: that of the data, as from a recording.

    Returns:
        The axes.

    Raises:
        InputError: If it is not a graph, or matplotlib is not installed.
    """
    style.check_axes(ax)
    data = style.to_data(graph, epoch)
    if style.candidate_blocks(data) is None:
        raise InputError("the data does not contain its candidates: give the graph, or the result of to_data()")
    ax = style.new_axes(8.0, 7.0) if ax is None else ax
    arrangement = arrange(data)
    cells = Cells(data, arrangement)
    image = cells.draw(ax)
    cells.draw_bar(image, ax)
    draw_groups(ax, data, arrangement, cells)
    ax.set_title(style.title(data), fontsize="medium")
    return ax


class Cells:
    """The matrix of a wiring, in cells that never cross the bound of a group.

    Args:
        data: The wiring.
        arrangement: The order of its nodes.
        by_pair: Whether cells may be pairs, which they are in small graphs of known weights.

    Attributes:
        bounds: Places of the bounds of the cells, from 0 to the number of nodes.
        candidates: Number of candidates in each cell, targets × sources.
        real: Number of real edges in each cell.
        by_pair: Whether a cell is a pair whose weight is known.
        label: The meaning of the colours.
        extend: The ends at which the colour bar extends.
    """

    def __init__(self, data: Data, arrangement: Arrangement, by_pair: bool = True) -> None:
        self.data = data
        self.by_pair = by_pair and data.num_nodes <= _MOST_NODES and data.get("edge_weight") is not None
        self.by_pair &= int(data.get("places") or 1) == 1
        sizes, side = arrangement.sizes, 1
        if data.num_nodes > _MOST_NODES:
            density = data.num_edges / (style.num_candidates(data) or 1) * int(data.get("places") or 1)
            wanted = max(data.num_nodes / _CELLS, math.sqrt(_EDGES / max(density, 1e-9)))
            common = math.gcd(*sizes)
            divisors = [n for n in range(1, common + 1) if common % n == 0]
            side = min(divisors, key=lambda n: abs(math.log(n / wanted)))
            side = side if 0.5 <= side / wanted <= 2 else math.ceil(wanted)
        self.bounds = [0]
        for group in style.groups(sizes):
            count = max(1, round(len(group) / side))
            self.bounds += [group.start + len(group) * n // count for n in range(1, count + 1)]
        even = len({*np.diff(self.bounds).tolist()}) == 1
        self.cell = torch.empty(data.num_nodes, dtype=torch.long)
        widths = torch.tensor(np.diff(self.bounds))
        self.cell[arrangement.order] = torch.repeat_interleave(torch.arange(len(widths)), widths)
        self.candidates = self._count_candidates()
        self.real = self.count(data.edge_index)
        self.label, self.extend = "weight of a real edge (grey: 0)", "both"
        if not self.by_pair:
            pairs = f"{side} × {side} pairs" if even else f"about {side} × {side} pairs"
            self.label = f"real share of the candidates in a cell of {pairs}"
            self.extend = "max"

    def at(self, data: Data) -> Cells:
        """Return the same cells with the edges of another moment."""
        cells = copy.copy(self)
        cells.data, cells.real = data, self.count(data.edge_index)
        return cells

    def _count_candidates(self) -> Float[Tensor, "cells cells"]:
        count, total = len(self.bounds) - 1, torch.zeros(len(self.bounds) - 1, len(self.bounds) - 1)
        for a, b, c, d in style.candidate_blocks(self.data) or []:
            sources, targets = (self.cell[start:end].bincount(minlength=count) for start, end in ((a, b), (c, d)))
            total += torch.outer(targets, sources)
        return total * int(self.data.get("places") or 1)

    def count(self, edge_index: Int[Tensor, "2 edges"]) -> Float[Tensor, "cells cells"]:
        """Return the number of edges in each cell."""
        count = len(self.bounds) - 1
        flat = self.cell[edge_index[1]] * count + self.cell[edge_index[0]]
        return flat.bincount(minlength=count * count).view(count, count).float()

    def density(self, real: Tensor) -> np.ndarray:
        """Return the real share of the candidates in each cell; NaN without candidates."""
        return (real / self.candidates).numpy()

    def limit(self) -> float:
        """Return the |w| or the share of full colour: one that few edges or cells are above."""
        if self.by_pair:
            return style.full_colour(self.data)
        return max(float(np.nanquantile(self.density(self.real), 0.99)), 1e-6)

    def draw(self, ax: matplotlib.axes.Axes, limit: float | None = None) -> Any:
        """Draw the cells, and return the data for a colour bar.

        Args:
            ax: Where to draw.
            limit: The |w| or the share of full colour. Default: :meth:`limit`.
        """
        from matplotlib.colors import FuncNorm, LinearSegmentedColormap, ListedColormap, PowerNorm

        ax.set_facecolor("white")
        limit = self.limit() if limit is None else limit
        scale: dict[str, Any]
        if self.by_pair:
            values = np.full(self.candidates.shape, np.nan)
            source, target = self.cell[self.data.edge_index]
            values[target, source] = self.data.edge_weight.float()
            # A step at zero: the weakest real edge still differs from white.
            steps = [(0, style.NEGATIVE), (0.5, "#F7CFB2"), (0.5, "#B5D7EC"), (1, style.POSITIVE)]
            root = (lambda w: np.sign(w) * np.sqrt(np.abs(w)), lambda root: np.sign(root) * root**2)
            scale = {"norm": FuncNorm(root, vmin=-limit, vmax=limit)}
            colours = LinearSegmentedColormap.from_list("sign", steps)
        else:
            values = self.density(self.real)
            scale = {"norm": PowerNorm(0.5, vmin=0, vmax=limit)}
            colours = LinearSegmentedColormap.from_list("density", style.DENSITY)
        image = ax.pcolormesh(
            self.bounds, self.bounds, np.ma.masked_invalid(values), cmap=colours, rasterized=True, **scale
        )
        if self.by_pair and (values == 0).any():
            zeros = np.ma.masked_where(values != 0, values)
            ax.pcolormesh(self.bounds, self.bounds, zeros, cmap=ListedColormap([style.KEPT]), rasterized=True)
        return image

    def draw_bar(self, image: Any, ax: Any) -> None:
        """Draw the colour bar for the result of :meth:`draw`."""
        written = None if self.by_pair else lambda value, _: style.share(value)
        ax.figure.colorbar(image, ax=ax, label=self.label, extend=self.extend, shrink=0.7, format=written)


def draw_groups(ax: matplotlib.axes.Axes, data: Data, arrangement: Arrangement, cells: Cells, order: str = "") -> None:
    """Draw bounds and names of groups, densities, and hatching for non-candidates; hide groups without candidates.

    Args:
        ax: Where to draw.
        data: The wiring.
        arrangement: The order of its nodes.
        cells: Its cells.
        order: What that order is, for the label, if not that of the wiring itself.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    groups = style.groups(arrangement.sizes)
    at = [np.searchsorted(cells.bounds, [group.start, group.stop]) for group in groups]
    narrow = [len(group) < _NARROW * data.num_nodes for group in groups]
    dynamic = style.is_dynamic(data)
    number: dict[str, Any] = {"ha": "center", "va": "center", "fontweight": "bold", "color": style.LIVE}
    if cells.by_pair:  # whose cells a box would hide
        number["path_effects"] = [withStroke(linewidth=2.5, foreground="white", alpha=0.8)]
    else:
        number["bbox"] = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    for row, target in enumerate(groups):
        for column, source in enumerate(groups):
            part = (slice(*at[row]), slice(*at[column]))
            candidates, real = float(cells.candidates[part].sum()), int(cells.real[part].sum())
            corner = (source.start, target.start)
            if not candidates:
                hatch: dict[str, Any] = {
                    "facecolor": "white",
                    "edgecolor": style.IMPOSSIBLE,
                    "hatch": "////",
                    "linewidth": 0,
                }
                ax.add_patch(Rectangle(corner, len(source), len(target), zorder=0, **hatch))
                continue
            if dynamic and column >= row and cells.by_pair:
                ax.add_patch(Rectangle(corner, len(source), len(target), color=style.FEEDBACK, zorder=0))
            if not (narrow[row] or narrow[column]):
                middle = (source.start + source.stop) / 2, (target.start + target.stop) / 2
                ax.text(*middle, style.share(real / candidates), **number)
    for bound in (0, *(group.stop for group in groups)):
        ax.axhline(bound, color=style.LIVE, linewidth=0.6)
        ax.axvline(bound, color=style.LIVE, linewidth=0.6)
    middles = [(group.start + group.stop) / 2 for group in groups]
    names = [f"{name}\n{size:,}" for name, size in zip(arrangement.names, arrangement.sizes, strict=True)]
    ax.set_xticks(middles, names)
    for label, each in zip(ax.get_xticklabels(), narrow, strict=True):
        label.set_rotation(90 if each else 0)
    ax.set_yticks(
        middles, [name.replace("\n", ": ") if each else name for name, each in zip(names, narrow, strict=True)]
    )
    ax.tick_params(length=0)
    shown = cells.candidates > 0
    for limits, there, flip in ((ax.set_xlim, shown.any(0), False), (ax.set_ylim, shown.any(1), True)):
        places = there.nonzero().flatten()
        ends = cells.bounds[int(places[0])], cells.bounds[int(places[-1]) + 1]
        limits(*(reversed(ends) if flip else ends))
    note = ""
    if dynamic:
        first, second = _ranks(data)[0][data.edge_index]
        forward = int((first < second).sum())
        note = f"\n{forward:,} edges lead forward, {data.num_edges - forward:,} lead back or stay (feedback)"
    ax.set_xlabel(f"source{order}{note}")
    ax.set_ylabel("target")


@checked
def plot_layers(
    module: nn.Module, names: Sequence[str] | None = None, epoch: float | None = None
) -> matplotlib.figure.Figure:
    """Draw the sparse layers of a module, one block each: output channels downwards, input channels across.

    A cell is a rectangle of pairs of channels; it is darker the more of its weights are real. All blocks use the same
    colours, so that layers can be compared. The title of a block has name, shape and the share kept.

    Args:
        module: A module with sparse weights, see :func:`dnw_graph.sparsify`.
        names: Which weights. Default: all.
        epoch: Number of epochs so far, for the title.

    Returns:
        The figure; ``figure.savefig("layers.png")`` writes it.

    Raises:
        InputError: If there is no sparse weight, a name is unknown, or matplotlib is not installed.
    """
    found = sparse_weights(module)
    if not found:
        raise InputError(f"{type(module).__name__} has no sparse layer to draw: call sparsify first")
    datas = [style.to_data(layer_data(module, name), epoch) for name in (found if names is None else names)]
    columns = min(4, len(datas))
    rows = math.ceil(len(datas) / columns)
    figure = style.figure(3.2 * columns + 0.8, 3.0 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    cells = [Cells(data, arrange(data), by_pair=False) for data in datas]
    # Black is what few cells of all layers are above.
    values = np.concatenate([(shares := each.density(each.real))[~np.isnan(shares)] for each in cells])
    vmax = max(float(np.quantile(values, 0.99)), 1e-6)
    for ax, data, each in zip(axes, datas, cells, strict=False):
        image = each.draw(ax, vmax)
        inputs = int(data.input_mask.sum())
        ax.set_xlim(0, inputs)
        ax.set_ylim(data.num_nodes, inputs)
        weight = found[data.name][0]
        shape = "×".join(map(str, weight.shape))
        ax.set_title(f"{data.name}\n{shape}, {style.share(data.num_edges / weight.numel)} kept", fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel(f"{inputs:,} input channels")
        ax.set_ylabel(f"{data.num_nodes - inputs:,} output channels")
    for ax in axes[len(datas) :]:
        ax.set_axis_off()
    figure.colorbar(
        image,
        ax=axes.tolist(),
        label="real share of the weights in a cell",
        extend="max" if vmax < values.max() else "neither",
        shrink=0.7,
        format=lambda value, _: style.share(value),
    )
    kept = sum(data.num_edges for data in datas)
    of = sum(found[data.name][0].numel for data in datas)
    edges = f"k = {kept:,} of {of:,} weights ({style.share(kept / of)}) in {len(datas)} layers"
    title = ", ".join(filter(None, (datas[0].rule, edges, style.moment(datas[0]))))
    figure.suptitle(f"{type(module).__name__}: {title}", fontsize="medium")
    return figure
