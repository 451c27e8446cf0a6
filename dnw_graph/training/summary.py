"""The results of a run: a few lines to read, and files."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dnw_graph.analysis.cost import cost, live_nodes, neural_graphs
from dnw_graph.callbacks.wiring_monitor import edges_swapped, real_edges
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.sparse_layers import to_data, weight_graphs
from dnw_graph.sparse_layers.access import sparse_weights
from dnw_graph.sparse_layers.layers import LayerWeight
from dnw_graph.whole_file import file_names, make_writable, write_whole

if TYPE_CHECKING:
    import torch_geometric.data


@dataclass(frozen=True)
class GraphSummary:
    """One neural graph.

    Attributes:
        nodes: Number of nodes.
        real_edges: Number of real edges in evaluation.
        edges_swapped: Real edges that were hallucinated when training started; None if nothing was trained.
        dead_nodes: Nodes from which no path of real edges leads to an output of the model.
    """

    nodes: int
    real_edges: int
    edges_swapped: int | None
    dead_nodes: int


@dataclass(frozen=True)
class WeightSummary:
    """One sparse weight of a layer, see :func:`dnw_graph.sparse_layers.sparsify`.

    Attributes:
        weights: Number of weights.
        kept: Number of real ones in evaluation.
        density: ``kept`` / ``weights``.
    """

    weights: int
    kept: int
    density: float


@dataclass(frozen=True)
class Summary:
    """Result of a run.

    Attributes:
        top1: Share of test images whose class has the highest score, 0 to 1, for the weights at the end; for those of
            ``best.ckpt`` if training images were held out to choose it.
        top5: Share of test images whose class is among the five highest scores.
        best_top1: Highest top-1 after any epoch, of the images held out if there are some, or None if nothing was
            trained.
        best_epoch: The epoch of ``best_top1``, counted from 1, or None.
        parameters: Parameters of live nodes, real edges and all other layers.
        multiply_adds: Multiply-adds for one image, live nodes and real edges only.
        training_multiply_adds: Multiply-adds of the whole training, forward and backward, see
            :class:`~dnw_graph.training.TrainingCost`; None if nothing was trained.
        seconds: Time spent in training, or None.
        graphs: The neural graphs by name; empty for a model without any.
        weights: The sparse weights of layers by name, listed separately even if they share one ranking; empty for a
            model without any.
        options: Options of the run.
    """

    top1: float
    top5: float
    best_top1: float | None
    best_epoch: int | None
    parameters: int
    multiply_adds: int
    training_multiply_adds: int | None
    seconds: float | None
    graphs: dict[str, GraphSummary]
    weights: dict[str, WeightSummary]
    options: dict[str, Any]

    def lines(self) -> list[str]:
        """Return the summary as lines to print."""
        best, held_out = "", self.options.get("held_out")
        if self.best_top1 is not None:
            which = f"best.ckpt, {self.best_top1:.2%} of held-out images" if held_out else f"best {self.best_top1:.2%}"
            best = f"   ({which} after epoch {self.best_epoch})"
        rows = [("top-1", f"{self.top1:.2%}{best}"), ("top-5", f"{self.top5:.2%}")]
        if graphs := self.graphs.values():
            rows.append(("real edges", f"{sum(g.real_edges for g in graphs):,}"))
            swapped = [g.edges_swapped for g in graphs if g.edges_swapped is not None]
            if swapped:
                rows.append(("edges swapped", f"{sum(swapped):,} since the start"))
            rows.append(("dead nodes", f"{sum(g.dead_nodes for g in graphs):,} of {sum(g.nodes for g in graphs):,}"))
        if layers := self.weights.values():
            kept, weights = sum(layer.kept for layer in layers), sum(layer.weights for layer in layers)
            rows.append(("weights kept", f"{kept:,} of {weights:,} in sparse layers ({kept / weights:.1%})"))
        rows += [("parameters", f"{self.parameters:,}"), ("multiply-adds", f"{self.multiply_adds:,} per image")]
        if self.training_multiply_adds is not None:
            rows.append(("training", f"{self.training_multiply_adds / 1e12:,.3g} T multiply-adds"))
        if self.seconds is not None:
            minutes, seconds = divmod(round(self.seconds), 60)
            rows.append(("wall time", f"{minutes} min {seconds} s"))
        return [f"{name:15}{value}" for name, value in rows]


def summarize(
    model: nn.Module,
    image_size: int,
    metrics: dict[str, Any],
    options: dict[str, Any],
    initial: dict[str, Tensor] | None = None,
    best: tuple[float | None, int] = (None, 0),
    training_multiply_adds: int | None = None,
    seconds: float | None = None,
) -> Summary:
    """Collect the summary of a run.

    Args:
        model: The model with its final weights; left in evaluation mode.
        image_size: Height and width of the images.
        metrics: Holds ``val/top1`` and ``val/top5``.
        options: Options of the run.
        initial: Real edges per graph at the start of training, if any.
        best: Highest top-1 and its epoch.
        training_multiply_adds: Multiply-adds of the whole training.
        seconds: Time spent in training.
    """
    model.eval()
    live = live_nodes(model)
    swapped = edges_swapped(initial, real_edges(model)) if initial else {}
    graphs = {
        name: GraphSummary(
            graph.num_nodes, graph.num_real_edges, swapped.get(name), graph.num_nodes - int(live[name].sum())
        )
        for name, graph in neural_graphs(model).items()
    }
    kept: dict[LayerWeight, int] = {}
    for weight_graph in weight_graphs(model).values():
        kept |= weight_graph.real_edges_per_weight()
    weights = {
        name: WeightSummary(weight.numel, kept[weight], kept[weight] / weight.numel)
        for name, (weight, _) in sparse_weights(model).items()
    }
    costs = cost(model, (3, image_size, image_size))
    return Summary(
        top1=float(metrics["val/top1"]),
        top5=float(metrics["val/top5"]),
        best_top1=best[0],
        best_epoch=best[1] or None,
        parameters=costs.parameters,
        multiply_adds=costs.multiply_adds,
        training_multiply_adds=training_multiply_adds,
        seconds=seconds,
        graphs=graphs,
        weights=weights,
        options=options,
    )


def write_files(summary: Summary, model: nn.Module, directory: Path) -> list[str]:
    """Write ``summary.json`` and the wirings: ``wiring/<name>.pt``, and for neural graphs a picture ``<name>.png``.

    There is a file for every neural graph and for every sparse weight of a layer; characters other than ASCII letters,
    digits, ``.``, ``_`` and ``-`` in a name become ``_``. ``Data.from_dict(torch.load(path, weights_only=True))`` loads
    a ``.pt`` file as a PyG :class:`~torch_geometric.data.Data`. (A pickled ``Data`` would not load with
    ``weights_only=True``.)

    Args:
        summary: The summary.
        model: The model that it describes.
        directory: Directory of the run.

    Returns:
        The files written, relative to ``directory``.

    Raises:
        InputError: If a file cannot be written.
    """
    write_whole(directory / "summary.json", (json.dumps(asdict(summary), indent=2) + "\n").encode(), "--output")
    graphs, weights = neural_graphs(model), sparse_weights(model)
    files = [directory / "wiring" / name for name in file_names([*graphs, *weights])]
    if not files:
        return ["summary.json"]
    make_writable(files[0].parent, "--output")
    epoch = None
    if summary.seconds is not None:
        epoch = summary.best_epoch if summary.options.get("held_out") else summary.options.get("epochs")
    for graph, file in zip(graphs.values(), files, strict=False):
        _save_picture(graph, file.with_name(f"{file.name}.png"), epoch)
        _save_data(graph.to_data(), file.with_name(f"{file.name}.pt"))
    for name, file in zip(weights, files[len(graphs) :], strict=True):
        _save_data(to_data(model, name), file.with_name(f"{file.name}.pt"))
    return ["summary.json", *(["wiring/*.png"] if graphs else []), "wiring/*.pt"]


def _save_picture(graph: NeuralGraph, path: Path, epoch: int | None) -> None:
    from dnw_graph.visualize import plot_adjacency, style

    figure = style.figure(8.0, 7.0)
    plot_adjacency(graph, figure.subplots(), epoch)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getbuffer(), "--output")


def _save_data(data: torch_geometric.data.Data, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(data.to_dict(), buffer)
    write_whole(path, buffer.getbuffer(), "--output")
