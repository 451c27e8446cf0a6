"""Compares a training step of torchvision's models with sparse weights to a dense one.

A step is the forward pass on random images, the loss, the backward pass, and SGD with momentum and weight decay. The
sparse model keeps a share of all weights of its layers (``dnw_graph.sparse_layers``), selected again in every step; the
masks take the rest of the difference. Evaluation is a forward pass without gradients. Run with
``python benchmarks/sparse_step.py --threads 1``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from timing import arguments, median_times, report
from torch import Tensor, nn

from dnw_graph.sparse_layers import sparsify

# Model, images, side of the images.
CASES = (("resnet50", 8, 64), ("resnet50", 32, 64), ("resnet50", 4, 224), ("vit_b_16", 4, 224))


def main() -> None:
    """Print a row for every case."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--density", type=float, default=0.1, help="share of weights that every layer keeps")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for name, batch, side in CASES:
        torch.manual_seed(0)
        dense = torchvision.models.get_model(name, num_classes=10).to(options.device)
        sparse = copy.deepcopy(dense)
        sparsify(sparse, options.density)
        x = torch.randn(batch, 3, side, side, device=options.device)
        row: dict[str, object] = {"model": f"{name}, {batch} × {side}²"}
        for phase, way in (("training", _train), ("evaluation", _evaluate)):
            ways: dict[str, Callable[[], object]] = {}
            for kind, model in (("dense", dense), ("sparse", sparse)):
                optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
                ways[kind] = partial(way, model.train(phase == "training"), optimiser, x)
            times = median_times(ways, options.rounds, options.device)
            row |= {f"dense {phase}, ms": times["dense"], f"sparse / dense, {phase}": times["sparse"] / times["dense"]}
        rows.append(row)
    report(f"Sparse weights, density {options.density:g}: a step relative to the dense one", rows, options)


def _train(model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor) -> None:
    optimiser.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 10).backward()
    optimiser.step()


def _evaluate(model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


if __name__ == "__main__":
    main()
