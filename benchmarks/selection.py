"""Times the selection of the k largest |w| against one full sort, and as a share of a training step.

``carried`` is the method of a graph in training: on a CPU it starts from the threshold of the previous step. ``cold``
starts without one. Between two turns the weights change: by a small random step, or, in the rows of whole models, by a
training step with SGD. In every turn all methods choose from the same weights; the results of the last turn are
compared. Run with
``python benchmarks/selection.py --threads 1``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timing import arguments, median_times, report
from torch import Tensor, nn
from torchvision.models import resnet50

from dnw_graph.analysis.cost import neural_graphs
from dnw_graph.models import MobileNetV1DNW, TinyClassifier
from dnw_graph.selection import Selector, new_flag, select_top_k
from dnw_graph.sparse_layers import sparsify, weight_graphs

# Candidates and k.
GRAPHS = {
    "stage 4 of MobileNetV1-DNW ×0.225": (4_718_592, 72_990),
    "stage 5": (2_097_152, 79_626),
    "stage 3": (131_072, 4_976),
    "tiny discrete": (640_000, 32_000),
    "largest layers of ResNet-50, 10%": (2_359_296, 235_930),
}


def main() -> None:
    """Time every graph and model and print one row for each."""
    options = arguments(__doc__ or "").parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for name, (candidates, k) in GRAPHS.items():
        weight = torch.empty(candidates, device=options.device).uniform_(-0.02, 0.02)
        rows.append(_row(name, partial(list, [weight]), [k], partial(_move, weight), options))
    tiny = TinyClassifier("static").to(options.device)
    rows.append(_model_row("tiny static, 128 × 32²", tiny, (128, 32), options))
    mobilenet = MobileNetV1DNW(width=0.225, num_classes=10, stem_stride=1).to(options.device)
    rows.append(_model_row("MobileNetV1-DNW ×0.225, 128 × 32²", mobilenet, (128, 32), options))
    resnet = resnet50(num_classes=10).to(options.device)
    sparsify(resnet, 0.1)
    rows.append(_model_row("sparse ResNet-50, 10%, 32 × 64²", resnet, (32, 64), options))
    for row in rows[: len(GRAPHS)]:  # There the step is not a training step.
        row["step, ms"] = row["carried / step"] = None
    report("Selection: time relative to one full sort", rows, options)


def _model_row(name: str, model: nn.Module, images: tuple[int, int], options: Namespace) -> dict[str, object]:
    """Time the selection for all graphs of a model, and its training step, which includes a selection."""
    batch, side = images
    x = torch.randn(batch, 3, side, side, device=options.device)
    labels = torch.randint(10, (batch,), device=options.device)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    graphs, layers = neural_graphs(model).values(), weight_graphs(model).values()

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimiser.step()

    def weights() -> list[Tensor]:
        of_layers = [layer.candidate_weight.detach() for layer in layers]
        return [*(graph.candidates.weight.detach() for graph in graphs), *of_layers]

    numbers = [graph.num_edges for graph in graphs] + [layer.num_edges for layer in layers]
    return _row(name, weights, numbers, step, options)


def _row(
    name: str,
    weights: Callable[[], list[Tensor]],
    numbers: Sequence[int],
    step: Callable[[], None],
    options: Namespace,
) -> dict[str, object]:
    selectors, flag = [Selector() for _ in numbers], new_flag(options.device)
    found: dict[str, list[Tensor]] = {}
    current: list[Tensor] = []

    def move() -> None:
        step()
        current[:] = weights()

    def way(name: str, select: Callable[[int, Tensor, int], Tensor]) -> Callable[[], None]:
        def choose() -> None:
            found[name] = [select(i, weight, k) for i, (weight, k) in enumerate(zip(current, numbers, strict=True))]

        return choose

    ways = {
        "step": move,
        "carried": way("carried", lambda i, weight, k: selectors[i].select(weight, k, name, flag)),
        "cold": way("cold", lambda i, weight, k: select_top_k(weight, k, name)),
        "topk": way("topk", lambda i, weight, k: torch.topk(weight.abs(), k, sorted=False).indices),
        "sort": way("sort", lambda i, weight, k: weight.abs().sort(descending=True, stable=True).indices[:k]),
    }
    times = median_times(ways, options.rounds, options.device)
    _compare(found, current)
    return {
        "graph or model": name,
        "candidates": f"{sum(weight.numel() for weight in current):,}",
        "k": f"{sum(numbers):,}",
        "full sort, ms": times["sort"],
        "carried, ms": times["carried"],
        **{f"{way} / sort": times[way] / times["sort"] for way in ("topk", "cold", "carried")},
        "step, ms": times["step"],
        "carried / step": times["carried"] / times["step"],
    }


def _compare(found: dict[str, list[Tensor]], weights: Sequence[Tensor]) -> None:
    for i, weight in enumerate(weights):
        expected = found["sort"][i].sort().values
        assert torch.equal(found["carried"][i], expected)
        assert torch.equal(found["cold"][i], expected)
        # Among equal magnitudes, the choice of torch.topk is undefined.
        assert torch.equal(weight[found["topk"][i]].abs().sort().values, weight[expected].abs().sort().values)


def _move(weight: Tensor) -> None:
    """A step as small as in training: a thousandth of the weights' range."""
    weight.add_(torch.randn_like(weight), alpha=2e-5)


if __name__ == "__main__":
    main()
