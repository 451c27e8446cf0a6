"""How a wiring changed: curves over time, and an animation."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dnw_graph.arguments import checked, require
from dnw_graph.visualize import style
from dnw_graph.visualize.graphs import curves, draw_nodes
from dnw_graph.visualize.matrices import Cells, arrange, draw_groups
from dnw_graph.visualize.recorded_graph import QUANTILES, RecordedGraph
from dnw_graph.whole_file import write_whole

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

# Approximate number of moments at which degrees are counted.
_MOST_MOMENTS = 40
# So many opacities of edges, colours, and dots per inch has an animation.
_SHADES, _COLOURS, _DPI = 4, 64, 85
# Graphs with up to so many edges are animated as nodes and edges, others as matrices.
_MOST_LINES = 600


def times(graph: RecordedGraph) -> tuple[list[float], str]:
    """Return the moments as numbers for an axis, and their unit: epochs if all are known and differ, else steps."""
    epochs = [moment.epoch for moment in graph.moments if moment.epoch is not None]
    increasing = all(before < after for before, after in pairwise(epochs))
    if increasing and len(epochs) == len(graph.moments):
        return epochs, "epoch"
    return [float(moment.step) for moment in graph.moments], "step"


@checked
def plot_evolution(graph: RecordedGraph) -> matplotlib.figure.Figure:
    """Draw how a wiring changed: six curves over time.

    The edges born and gone at every moment; the shares of the first and of the last edges that are real at each moment;
    the life spans of edges, in steps; in-degrees and out-degrees; dead nodes per block; and quantiles of |w| over the
    real edges.

    Args:
        graph: A graph of a :class:`Recording`.

    Returns:
        The figure; ``figure.savefig("evolution.png")`` writes it.

    Raises:
        InputError: If matplotlib is not installed.
    """
    at, unit = times(graph)
    figure = style.figure(11.0, 6.2)
    swaps, kept, spans, degrees, dead, magnitude = figure.subplots(2, 3).flatten()
    _draw_swaps(swaps, graph, at, unit)
    _draw_kept(kept, graph, at)
    _draw_spans(spans, graph)
    _draw_degrees(degrees, graph, at)
    _draw_dead(dead, graph, at)
    _draw_fan(magnitude, at, graph.magnitudes())
    magnitude.set_title("|w| of the real edges")
    magnitude.set_ylim(bottom=0)
    for ax in (swaps, kept, degrees, dead, magnitude):
        ax.set_xlabel(unit)
        ax.set_xlim(at[0], max(at[-1], at[0] + 1e-9))
    for ax in figure.axes:
        ax.title.set_fontsize("medium")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(style.title(graph.to_data(), f"{unit} {at[0]:g} to {at[-1]:g}"), fontsize="medium")
    return figure


def _rates(graph: RecordedGraph, at: list[float]) -> np.ndarray:
    """Return the edges born and gone per epoch or step, since the moment before; at the first one none."""
    rates: np.ndarray = graph.swaps().T / np.diff(at, prepend=at[0] - 1)
    return rates


def _draw_swaps(ax: matplotlib.axes.Axes, graph: RecordedGraph, at: list[float], unit: str) -> None:
    (born, gone), total = _rates(graph, at), graph.swaps().sum(0)
    ax.fill_between(at, born, step="pre", color=style.BORN, label=f"born: {total[0]:,} in total", linewidth=0)
    ax.fill_between(at, -gone, step="pre", color=style.GONE, label=f"gone: {total[1]:,} in total", linewidth=0)
    ax.axhline(0, color=style.LIVE, linewidth=0.6)
    ax.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    ax.set_ylim(top=1.5 * max(1.0, float(born.max())))  # with room for the legend
    ax.legend(frameon=False, fontsize="small", loc="upper right")
    ax.set_title(f"edges born and gone per {unit}")


def _draw_kept(ax: matplotlib.axes.Axes, graph: RecordedGraph, at: list[float]) -> None:
    ends = graph.edges(0), graph.edges(-1)
    shares = []
    for moment in range(len(graph)):  # One moment in memory at a time.
        now = graph.edges(moment)
        shares.append([np.isin(edges, now, assume_unique=True).mean() if len(edges) else 0 for edges in ends])
    looks = (style.SIDE, "--", "of the first edges"), (style.MAIN, "-", "of the last edges")
    for real, (colour, dashes, label) in zip(zip(*shares, strict=True), looks, strict=True):
        ax.plot(at, real, color=colour, linestyle=dashes, label=label)
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    ax.legend(frameon=False, fontsize="small")
    ax.set_title("real at this moment")


def _draw_spans(ax: matplotlib.axes.Axes, graph: RecordedGraph) -> None:
    spans, ended = graph.life_spans()
    bins = np.linspace(0, max(int(spans.max(initial=1)), 1), 26)
    ax.hist(
        [spans[ended], spans[~ended]],
        bins.tolist(),
        stacked=True,
        color=[style.GONE, style.KEPT],
        label=[f"gone: {ended.sum():,}", f"still real: {(~ended).sum():,}"],
    )
    ax.set_yscale("log")
    ax.set_ylim(top=ax.get_ylim()[1] ** 1.35)  # with room for the legend
    ax.set_xlabel("steps")
    ax.legend(frameon=False, fontsize="small", loc="upper right")
    ax.set_title("life spans of edges")


def _draw_degrees(ax: matplotlib.axes.Axes, graph: RecordedGraph, at: list[float]) -> None:
    moments = sorted({round(n) for n in np.linspace(0, len(graph) - 1, min(len(graph), _MOST_MOMENTS))})
    blocks = graph.candidate_blocks
    ends = [np.unique(np.concatenate([np.arange(block[n], block[n + 1]) for block in blocks])) for n in (0, 2)]
    for row, name, dashes in ((1, "in", "-"), (0, "out", "--")):
        nodes, found = ends[row], []
        for moment in moments:
            count = np.bincount(graph.pairs(graph.edges(moment))[row], minlength=graph.nodes.num_nodes)[nodes]
            found.append((np.median(count), np.quantile(count, 0.95)))
        middle, high = np.array(found).T
        when = [at[moment] for moment in moments]
        ax.plot(when, high, color=style.MAIN, linestyle=dashes, label=f"{name}: 95%")
        ax.plot(when, middle, color=style.SIDE, linestyle=dashes, label=f"{name}: median")
    highest = max(float(np.max(line.get_ydata())) for line in ax.lines)
    ax.set_ylim(0, 1.6 * max(1.0, highest))  # with room for the legend
    ax.legend(frameon=False, fontsize="small", loc="upper right", ncols=2)
    ax.set_title("degrees: median and 95th percentile")


def _draw_dead(ax: matplotlib.axes.Axes, graph: RecordedGraph, at: list[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    live = np.array([graph.live(moment) for moment in range(len(graph))])
    shades = style.shades(len(graph.nodes.blocks))
    data = graph.to_data()
    dead = [(~live[:, group.start : group.stop]).sum(1) for group in graph.nodes.block_ranges]
    there = [number for number, count in enumerate(dead) if count.any()]
    names = style.block_names(data)
    if there:
        shown = [(dead[n], shades[n], f"{names[n]}: {dead[n][-1]:,}") for n in there]
        layers, colours, labels = zip(*shown, strict=True)
        ax.stackplot(at, *layers, colors=colours, labels=labels)
        ax.legend(frameon=False, fontsize="small", loc="upper left", ncols=2)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(f"dead nodes, of {graph.nodes.num_nodes:,}")
    ax.set_ylim(0, 1.4 * max(1, int(sum(dead).max())))  # with room for the legend


def _draw_fan(ax: matplotlib.axes.Axes, at: list[float], values: np.ndarray) -> None:
    low, lower, middle, upper, high = values.T
    names = [f"{100 * each:.0f}%" for each in QUANTILES]
    ax.fill_between(at, low, high, color=style.BANDS[0], linewidth=0, label=f"{names[0]} to {names[-1]}")
    ax.fill_between(at, lower, upper, color=style.BANDS[1], linewidth=0, label=f"{names[1]} to {names[-2]}")
    ax.plot(at, middle, color=style.MAIN, label="median")
    ax.legend(edgecolor="none", framealpha=0.9, fontsize="small")


@checked
def animate(graph: RecordedGraph, path: str | Path, frames: int = 60, seconds: float = 12.0) -> None:
    """Write an animation of a wiring as a GIF.

    In a graph of up to 600 edges, edges born since the previous frame are green, and edges that will be gone in the
    next one are dashed purple. The others are blue for a positive weight, orange for a negative and grey for a zero
    one, more opaque for a larger √|w| within the frame. Larger graphs, graphs with cycles and layers are matrices as in
    :func:`plot_adjacency`, with the same cells and colours in all frames: weights if those of every frame are known,
    else shares. Nodes of graphs with cycles are ordered by their distance at the last moment; the numbers of edges that
    lead forward and back are those of the frame. A curve below shows how many edges are born per epoch or step.

    Args:
        graph: A graph of a :class:`Recording`.
        path: The file.
        frames: Largest number of frames; other moments are skipped.
        seconds: Duration. The last frame stays for two more seconds.

    Raises:
        InputError: If an argument is out of range, the file cannot be written, or matplotlib is not installed.
    """
    require(frames >= 1, "animate: frames", "an integer >= 1", frames)
    require(seconds > 0, "animate: seconds", "a number above 0", seconds)
    write_whole(Path(path), gif(graph, frames, seconds), "path")


def gif(graph: RecordedGraph, frames: int = 60, seconds: float = 12.0) -> bytes:
    """Return the file that :func:`animate` writes."""
    from PIL import Image

    moments = sorted({round(n) for n in np.linspace(0, len(graph) - 1, min(frames, len(graph)))})
    film = _Film(graph, moments)
    pictures = [film.picture(number) for number in range(len(moments))]
    # One palette for all frames, including rare colours, so that unchanged parts do not flicker.
    key = [[int(colour[n : n + 2], 16) for n in (1, 3, 5)] for colour in (style.BORN, style.GONE)]
    rare = np.repeat(np.array(key, np.uint8), 20, axis=0)[:, None].repeat(pictures[0].shape[1], axis=1)
    sample = np.concatenate([pictures[0], pictures[len(pictures) // 2], pictures[-1], rare])
    palette = Image.fromarray(sample).quantize(_COLOURS, dither=Image.Dither.NONE)
    images = [Image.fromarray(each).quantize(palette=palette, dither=Image.Dither.NONE) for each in pictures]
    pace = round(1000 * seconds / len(moments))
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=images[1:],
        duration=[pace] * (len(images) - 1) + [pace + 2000],
        loop=0,
        optimize=True,
    )
    return buffer.getvalue()


class _Film:
    """Draws all frames into one figure."""

    def __init__(self, graph: RecordedGraph, moments: list[int]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self.graph, self.moments = graph, moments
        data = graph.to_data()
        most = max(len(graph.edges(moment)) for moment in moments)
        self.as_lines = most <= _MOST_LINES and graph.dynamics == "Static"
        self.figure = style.figure(8.4, 5.2 if self.as_lines else 7.6)
        FigureCanvasAgg(self.figure)
        self.figure.set_dpi(_DPI)
        self.ax, self.below = self.figure.subplots(2, 1, height_ratios=(7, 1) if self.as_lines else (10, 1))
        self.at, unit = times(graph)
        born = _rates(graph, self.at)[0]
        self.below.fill_between(self.at, born, step="pre", color=style.BORN, linewidth=0)
        self.below.set_xlim(self.at[0], max(self.at[-1], self.at[0] + 1e-9))
        self.below.set_ylim(0, max(int(np.quantile(born, 0.98)), 1) * 1.1)
        self.below.set_xlabel(unit)
        self.below.set_ylabel(f"born per\n{unit}")
        self.below.spines[["top", "right"]].set_visible(False)
        self.cursor = self.below.axvline(self.at[0], color=style.LIVE)
        if not self.as_lines:
            self.arrangement = arrange(data)
            known = all(graph.weights(moment) is not None for moment in moments)
            self.cells = Cells(data, self.arrangement, by_pair=known)
            self.limit = max(self.cells.at(graph.to_data(moment)).limit() for moment in moments)
        else:
            self.zeros = any(np.any(graph.weights(moment) == 0) for moment in moments)

    def picture(self, number: int) -> np.ndarray:
        """Return a frame as an array of colours."""
        moment = self.moments[number]
        data = self.graph.to_data(moment)
        self.ax.clear()
        (self._lines if self.as_lines else self._matrix)(data, number)
        self.ax.set_title(style.title(data), fontsize="medium")
        self.cursor.set_xdata([self.at[moment]] * 2)
        canvas: Any = self.figure.canvas
        canvas.draw()
        if number == 0:  # places of the axes stay
            self.figure.set_layout_engine("none")
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def _lines(self, data: style.Data, number: int) -> None:
        from matplotlib.collections import LineCollection
        from matplotlib.colors import to_rgba

        now = self.graph.edges(self.moments[number])
        before = self.graph.edges(self.moments[number - 1]) if number else now
        after = self.graph.edges(self.moments[number + 1]) if number + 1 < len(self.moments) else now
        order = data.edge_weight.abs().argsort()
        colours, opacity = style.sign_colours(data, order)
        # Parts that hardly change stay the same in the next frame, for a small file.
        opacity = (opacity * _SHADES).round().clamp(min=1) / _SHADES
        born, gone = (~np.isin(now, others)[order.numpy()] for others in (before, after))
        shades = []
        for colour, alpha, new, leaving in zip(colours, opacity.tolist(), born, gone, strict=True):
            shades.append(to_rgba(style.BORN) if new else to_rgba(style.GONE) if leaving else to_rgba(colour, alpha))
        dashes = [(0, (3, 2)) if leaving and not new else "-" for new, leaving in zip(born, gone, strict=True)]
        changed, routes = born | gone, curves(data, order)
        for some, wide, above in ((~changed, 1.1, 1.0), (changed, 2.2, 1.5)):
            chosen = some.nonzero()[0].tolist()
            paths, tints, dash = ([each[n] for n in chosen] for each in (routes, shades, dashes))
            lines = LineCollection(paths, colors=tints, linewidths=wide, linestyles=dash or "-", zorder=above)
            self.ax.add_collection(lines)
        draw_nodes(self.ax, data, style.block_names(data))
        self.ax.set_xlim(-0.04, 1.04)
        dead = int((~data.live_mask).sum())
        legend = (
            (style.POSITIVE, "w > 0", "-"),
            (style.NEGATIVE, "w < 0", "-"),
            *([(style.KEPT, "w = 0", "-")] * self.zeros),
            (style.BORN, "born", "-"),
            (style.GONE, "going", "--"),
        )
        style.legend_above(self.below, legend, f"{dead} of {data.num_nodes} nodes are dead (hollow)")

    def _matrix(self, data: style.Data, number: int) -> None:
        cells = self.cells.at(data)
        image = cells.draw(self.ax, self.limit)
        order = ", nodes by distance at the last moment" if style.is_dynamic(data) else ""
        draw_groups(self.ax, data, self.arrangement, cells, order)
        if number == 0:
            cells.draw_bar(image, self.ax)
