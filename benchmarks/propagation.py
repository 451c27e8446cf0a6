"""Compares the times of the propagations: evaluation, and a training step's forward and backward pass.

Each row is one static graph of two blocks, both with node functions, random edges of the given density (so that nothing
is ranked), and channels-last maps, as after a convolution. Run with
``python benchmarks/propagation.py``; with the extension packages installed, ``torch_sparse`` adjacencies are timed too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch_geometric.typing
from timing import arguments, median_times, report
from torch import Tensor

from dnw_graph import InputError, NeuralGraph, View, Wiring
from dnw_graph.propagation import (
    AutoPropagation,
    BlockPropagation,
    MessagePassingPropagation,
    Propagation,
    RealEdges,
    SparsePropagation,
)

# Targets, sources, density, batch, side of the map: blocks of MobileNetV1-DNW's stages, of the tiny graph, of others.
SHAPES = (
    (64, 32, 0.05, 128, 32),
    (64, 32, 0.05, 4, 32),
    (128, 192, 0.04, 128, 16),
    (128, 192, 0.04, 8, 16),
    (256, 384, 0.04, 128, 8),
    (256, 384, 0.20, 128, 8),
    (256, 384, 0.50, 128, 8),
    (512, 2816, 0.0155, 128, 4),
    (512, 2816, 0.0155, 16, 4),
    (512, 2816, 0.0155, 4, 4),
    (512, 2816, 0.0155, 1, 14),
    (512, 2816, 0.05, 32, 4),
    (512, 2816, 0.20, 32, 4),
    (512, 2816, 0.50, 32, 4),
    (512, 512, 0.05, 8, 14),
    (512, 512, 0.20, 8, 14),
    (1024, 1536, 0.038, 128, 2),
    (1024, 1536, 0.038, 1, 7),
    (1024, 1536, 0.30, 128, 2),
    (800, 800, 0.05, 128, 8),
)


class Drawn(Wiring):
    """Edges that are drawn once; every candidate gets a gradient."""

    index: Tensor

    def setup(self, view: View) -> None:
        """Draw the edges."""
        self.register_buffer("index", torch.randperm(view.num_candidates)[: view.k].sort().values)

    def choose(self, view: View) -> Tensor:
        """Return them."""
        return self.index


def ways() -> dict[str, Propagation]:
    """Return every propagation that can run here."""
    found: dict[str, Propagation] = {
        "block": BlockPropagation(),
        "sparse": SparsePropagation(),
        "csr": MessagePassingPropagation("csr"),
        "edge_index": MessagePassingPropagation(),
    }
    if torch_geometric.typing.WITH_TORCH_SPARSE:
        found["torch_sparse"] = MessagePassingPropagation("torch_sparse")
    return found


def main() -> None:
    """Time every shape and print one row for evaluation and one for training."""
    parser = arguments(__doc__ or "")
    others = [name for name in ways() if name != "block"]
    parser.add_argument("--ways", nargs="+", choices=others, default=others, help="propagations to compare with block")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for targets, sources, density, batch, side in SHAPES:
        torch.manual_seed(0)
        x = torch.randn(batch, sources, side, side, device=options.device).contiguous(memory_format=torch.channels_last)
        graphs: dict[str, NeuralGraph] = {}
        for name, propagation in ways().items():
            if name not in ("block", *options.ways):
                continue
            graph = NeuralGraph(
                (sources, targets),
                round(density * targets * sources),
                wiring=Drawn(),
                propagation=propagation,
                output_function=True,
            )
            try:
                graph.to(options.device).eval()(x)
            except InputError:  # Not available for this shape: messages that do not fit, or another device.
                continue
            graphs[name] = graph
        block = graphs["block"]
        edges = RealEdges(block.candidates, block.real_index, block.candidates.weight)
        takes = type(AutoPropagation().choose(edges, x)).__name__.removesuffix("Propagation")
        for phase, call in (("evaluation", _evaluate), ("training", _train)):
            calls: dict[str, Callable[[], object]] = {name: partial(call, graph, x) for name, graph in graphs.items()}
            for graph in graphs.values():
                graph.train(phase == "training")
            times = median_times(calls, options.rounds, options.device)
            shape = f"{targets} × {sources}, {density:.1%}, {batch} × {side}²"
            rows.append(
                {"targets × sources, density, maps": shape, "phase": phase, "block, ms": times["block"]}
                | {f"{name} / block": times[name] / times["block"] if name in times else None for name in options.ways}
                | {"auto takes": takes.lower()}
            )
    report("Propagation: time relative to the block path", rows, options)


def _evaluate(graph: NeuralGraph, x: Tensor) -> None:
    with torch.no_grad():
        graph(x)


def _train(graph: NeuralGraph, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    y = graph(x)
    y.backward(torch.ones_like(y))


if __name__ == "__main__":
    main()
