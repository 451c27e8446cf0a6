"""Times the ways of propagation against each other: evaluation, and a training step's forward and backward pass.

Each row is one static graph of two blocks without node functions, so that nothing but selection, propagation and the
gradients is timed. Run with ``python benchmarks/propagation.py``; with the extension packages installed, the
``torch_sparse`` adjacency is timed too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch_geometric.typing
from timing import arguments, median_times, report
from torch import Tensor

from dnw_graph import InputError, NeuralGraph
from dnw_graph.propagation import BlockPropagation, MessagePassingPropagation, Propagation

# Targets, sources, density, batch, side of the map: the last blocks of MobileNetV1-DNW's stages and of others.
SHAPES = (
    (64, 32, 0.05, 32, 16),
    (128, 192, 0.04, 32, 16),
    (512, 2816, 0.0155, 1, 14),
    (512, 2816, 0.0155, 32, 4),
    (512, 2816, 0.0155, 128, 4),
    (512, 2816, 0.05, 32, 4),
    (512, 512, 0.05, 8, 14),
    (512, 512, 0.20, 8, 14),
    (1024, 1536, 0.038, 1, 7),
    (1024, 1536, 0.038, 64, 2),
    (1024, 1536, 0.30, 64, 2),
    (800, 800, 0.05, 32, 8),
    (800, 800, 0.05, 128, 8),
    (256, 384, 0.05, 32, 8),
    (256, 768, 0.05, 32, 8),
)


def ways() -> dict[str, Propagation]:
    """Return every way that can run here."""
    found: dict[str, Propagation] = {
        "block": BlockPropagation(),
        "edge_index": MessagePassingPropagation(),
        "csr": MessagePassingPropagation("csr"),
    }
    if torch_geometric.typing.WITH_TORCH_SPARSE:
        found["torch_sparse"] = MessagePassingPropagation("torch_sparse")
    return found


def main() -> None:
    """Time every shape and print one row for evaluation and one for training."""
    options = arguments(__doc__ or "").parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for targets, sources, density, batch, side in SHAPES:
        torch.manual_seed(0)
        x = torch.randn(batch, sources, side, side, device=options.device).contiguous(memory_format=torch.channels_last)
        graphs: dict[str, NeuralGraph] = {}
        for name, propagation in ways().items():
            num_edges = round(density * targets * sources)
            graph = NeuralGraph((sources, targets), num_edges, propagation=propagation, input_function=False)
            try:
                graph.to(options.device).eval()(x)
            except InputError:  # Messages that do not fit are no way for this shape.
                continue
            graphs[name] = graph
        for phase, call in (("evaluation", _evaluate), ("training", _train)):
            calls: dict[str, Callable[[], object]] = {name: partial(call, graph, x) for name, graph in graphs.items()}
            for graph in graphs.values():
                graph.train(phase == "training")
            times = median_times(calls, options.rounds, options.device)
            shape = f"{targets} × {sources}, {density:.1%}, {batch} × {side}²"
            rows.append(
                {"targets × sources, density, maps": shape, "phase": phase, "block, ms": times["block"]}
                | {f"{name} / block": times[name] / times["block"] if name in times else None for name in ways()}
            )
    report("Propagation: time of each way relative to the block path", rows, options)


def _evaluate(graph: NeuralGraph, x: Tensor) -> None:
    with torch.no_grad():
        graph(x)


def _train(graph: NeuralGraph, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    y = graph(x)
    y.backward(y.detach())


if __name__ == "__main__":
    main()
