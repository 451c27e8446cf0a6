"""Times the kernels of ``dnw_graph.ops``: sparse products, and the stages of MobileNetV1-DNW ×0.225 at 224 px.

A product's row compares the kernel with PyTorch's sparse product (the same in CSR, with a reduction named) and with the
dense product of the same shape; a stage's row compares the fused kernel with the same graph in PyTorch's operations.
GFLOP/s count two FLOPs for every multiply-add of the edges and node functions; the first row is a large dense product,
which shows the speed of the machine. Run with ``python benchmarks/sparse_product.py --threads 1``.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable

import torch
from timing import arguments, median_times, report
from torch import Tensor

from dnw_graph.analysis.multiply_adds import performed
from dnw_graph.models import MobileNetV1DNW
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.ops import sparse_product, static_graph

# Targets, sources, edges, features: last blocks of the stages for one image and for several, and the tiny graph.
PRODUCTS = (
    (64, 32, 103, 112 * 112),
    (128, 192, 930, 56 * 56),
    (256, 384, 3732, 28 * 28),
    (512, 2816, 22000, 14 * 14),
    (512, 2816, 22000, 512),
    (512, 2816, 22000, 32 * 14 * 14),
    (1024, 1536, 59700, 7 * 7),
    (1024, 1536, 59700, 32 * 7 * 7),
    (800, 800, 32000, 128 * 8 * 8),
)
SIDES = (112, 112, 56, 28, 14)  # The inputs of each stage.
BATCHES = (1, 32)


def main() -> None:
    """Time every product and stage and print one row for each."""
    options = arguments(__doc__ or "").parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    square = torch.randn(1536, 1536, device=options.device)
    rows = [_row("dense 1536 × 1536 × 1536", {"kernel": lambda: square @ square}, options)]
    for product in PRODUCTS:
        torch.manual_seed(0)
        rows.append(
            _row("{} × {}, {} edges, {} features".format(*product), _product(*product, options.device), options)
        )
    model = MobileNetV1DNW(wiring="random_graph").to(options.device).eval()
    for batch in BATCHES:
        for stage, side in zip(model.stages, SIDES, strict=True):
            assert isinstance(stage, NeuralGraph)
            rows.append(_row(f"{stage.name}, {batch} × {side}²", _stage(stage, batch, side), options))
    report("Sparse products and fused stages", rows, options)


def _row(name: str, ways: dict[str, Callable[[], Tensor]], options: Namespace) -> dict[str, object]:
    with torch.no_grad():
        gflops = 2e-9 * performed(ways["kernel"])
        times = median_times(ways, options.rounds, options.device)
    return {
        "work": name,
        "GFLOP": gflops,
        "ms": times["kernel"],
        "GFLOP/s": 1e3 * gflops / times["kernel"],
        **{f"{way} / kernel": times[way] / times["kernel"] if way in times else None for way in ("PyTorch", "dense")},
    }


def _product(
    targets: int, sources: int, edges: int, features: int, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    chosen = torch.randperm(targets * sources, device=device)[:edges].sort().values
    rowptr = torch.searchsorted(chosen, sources * torch.arange(targets + 1, device=device))
    columns, values = chosen % sources, torch.randn(edges, device=device)
    z = torch.randn(sources, features, device=device)
    csr = torch.sparse_csr_tensor(rowptr, columns, values, (targets, sources), check_invariants=False)
    dense = csr.to_dense()
    return {
        "kernel": lambda: sparse_product(z, rowptr, columns, values),
        "PyTorch": lambda: torch.sparse.mm(csr, z, "sum") if z.device.type == "cpu" else csr @ z,
        "dense": lambda: dense @ z,
    }


def _stage(stage: NeuralGraph, batch: int, side: int) -> dict[str, Callable[[], Tensor]]:
    inputs, nodes = stage.num_inputs, stage.num_nodes
    sources, targets = stage.edge_index
    steps = torch.arange(inputs, nodes + 1, device=targets.device)
    functions = nodes - stage.num_outputs
    strides = [1 if stage.name == "stage1" else 2, *[1] * (len(stage.blocks) - 2), 0]
    numbers = (torch.randn(functions, *shape, device=targets.device) for shape in ((), (), (3, 3)))
    graph = (stage.blocks, strides, torch.searchsorted(targets, steps), sources, stage.edge_weight, *numbers)
    x = torch.randn(batch, inputs, side, side, device=targets.device)
    return {
        "kernel": lambda: static_graph(x, *graph),
        "PyTorch": lambda: _without_kernels(lambda: static_graph(x, *graph)),
    }


def _without_kernels(call: Callable[[], Tensor]) -> Tensor:
    os.environ["DNW_GRAPH_KERNELS"] = "0"
    try:
        return call()
    finally:
        del os.environ["DNW_GRAPH_KERNELS"]


if __name__ == "__main__":
    main()
