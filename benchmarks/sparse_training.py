"""Compares training steps of sparse layers that compute over their real weights alone with dense and masked ones.

Two tables. First, layers of ResNet-18 and a linear layer at several shares of weights: forward pass and both gradients
compared with the dense layer, and the share at which both take equally long; the rule of ``sparsify`` for when a layer
computes over edges (``dnw_graph.sparse_layers.layer_edges``) comes from it. Second, whole steps (forward pass, loss,
backward pass and SGD with momentum and weight decay) of ResNet-18 for images of 32 pixels and of a network 3072 – 768 –
3072: dense in PyTorch; sparse with masked weights (``sparse_kernels=False``); sparse over edges. The last columns break
down the time: products; passes over the dense weight and its ``.grad``, to read real weights and to write their
gradients; the optimiser, whose weights, gradients and states are dense too; everything else. They also give the peak
memory of a step beyond the model. CPU time, which other work on the machine disturbs little; all variants take turns.
Run with ``python benchmarks/sparse_training.py --threads 1``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchvision
from timing import arguments, median_times, report
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from dnw_graph import attach, sparsify
from dnw_graph.sparse_layers.forward_pass import RealWeights
from dnw_graph.sparse_layers.layer_edges import DENSEST, LayerEdges

# Inputs, outputs, kernel, stride, side of the maps; the last one is linear.
LAYERS = (
    (64, 64, 3, 1, 32),
    (64, 128, 3, 2, 32),
    (64, 128, 1, 2, 32),
    (128, 128, 3, 1, 16),
    (256, 256, 3, 1, 8),
    (512, 512, 3, 1, 4),
    (3072, 768, 0, 0, 0),
)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


def main() -> None:
    """Print the two tables."""
    parser = arguments(__doc__ or "", takes=("threads", "rounds"))
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--density", type=float, default=0.05, help="share of weights that every layer keeps")
    parser.add_argument("--rules", nargs="+", default=["random_graph", "set"], help="rules of the sparse networks")
    parser.add_argument(
        "--models", nargs="*", default=[*MODELS], choices=[*MODELS], help="networks of the second table"
    )
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="how many layers the first table has")
    parser.add_argument("--fused", action="store_true", help="use PyTorch's fused SGD")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shares = ", ".join(f"{kind.__name__} {share:.0%}" for kind, share in DENSEST.items())
    tables = {
        f"Layers, which compute over edges up to a share of: {shares}": [
            _layer_row(*layer, options) for layer in LAYERS[: options.layers]
        ],
        f"Training steps, batch {options.batch}, {options.density:.0%} of the weights": [
            row for name in options.models for row in _step_rows(name, options)
        ],
    }
    if not any(tables.values()):
        parser.error("nothing to time: give --layers or --models")
    (title, rows), *further = [(title, rows) for title, rows in tables.items() if rows]
    report(title, rows, options, further=dict(further))


def _layer_row(inputs: int, outputs: int, side: int, stride: int, maps: int, options: Any) -> dict[str, Any]:
    """Time forward pass and both gradients of one layer at several shares."""
    x = torch.randn(options.batch, inputs, *([maps, maps] if side else []), requires_grad=True)
    dense = nn.Conv2d(inputs, outputs, side, stride, side // 2) if side else nn.Linear(inputs, outputs)
    kind = f"{inputs} → {outputs}" + (f", {side}×{side}, stride {stride}, {maps}²" if side else "")
    ways: dict[str, Callable[[], object]] = {"dense": partial(_pass, dense, x, torch.randn_like(dense(x)))}
    for share in SHARES:
        sparse = copy.deepcopy(dense)
        sparsify(sparse, share, "random_graph")
        _compute_over_edges(sparse)
        ways[f"{share:.0%}"] = partial(_pass, sparse, x, torch.randn_like(dense(x)))
    times = _times(ways, options.rounds)
    ratios = {f"dense / {share:.0%}": times["dense"] / times[f"{share:.0%}"] for share in SHARES}
    even = _break_even({share: times[f"{share:.0%}"] for share in SHARES}, times["dense"])
    return {"layer": kind, "dense, ms": times["dense"], **ratios, "break-even share": even}


def _compute_over_edges(layer: Any) -> None:
    """Have a layer compute over edges whatever the rule for it says."""
    real = layer.parametrizations.weight[0]
    ((weight, graph),) = real.parts
    edges = LayerEdges(weight, graph.real_index)
    graph._as_edges = lambda *_: [edges]


def _pass(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    x.grad = None
    layer.zero_grad()
    layer(x).backward(grad)


def _resnet18() -> nn.Module:
    """ResNet-18 as it is used for CIFAR: a 3×3 convolution with stride 1 first, and no pooling after it."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3072, 768), nn.ReLU(), nn.Linear(768, 3072))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (_resnet18, (3, 32, 32)),
    "mlp": (_mlp, (3072,)),
}


def _step_rows(name: str, options: Any) -> list[dict[str, Any]]:
    """Time the steps of one network."""
    make, shape = MODELS[name]
    network = make()
    x, y = torch.randn(options.batch, *shape), torch.randint(10, (options.batch,))
    steps: dict[str, Step] = {"dense": Step(copy.deepcopy(network), x, y, options.fused)}
    for rule in options.rules:
        for kind, kernels in (("masked", False), ("edges", True)):
            model = copy.deepcopy(network)
            torch.manual_seed(1)
            sparsify(model, options.density, rule, sparse_kernels=kernels)
            steps[f"{rule}, {kind}"] = Step(model, x, y, options.fused)
    times = _times({way: step.__call__ for way, step in steps.items()}, options.rounds)
    return [
        {
            "network": name,
            "way": way,
            "ms": times[way],
            "dense / way": times["dense"] / times[way],
            **step.shares(),
            "MB beyond the model": step.peak() / 2**20,
        }
        for way, step in steps.items()
    ]


class Step:
    """A training step.

    Args:
        model: The network.
        x: Its inputs.
        y: Labels.
        fused: Whether SGD is PyTorch's fused one.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, fused: bool) -> None:
        self.model, self.x, self.y = model, x, y
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=fused)
        attach(model, self.optimizer, num_steps=10**6, steps_per_epoch=10**5)

    def __call__(self) -> None:
        """Take it."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def shares(self) -> dict[str, str]:
        """Return the shares of the time of several steps that each part and everything else take."""
        values_at = record_function("values_at")(RealWeights.values_at)
        with (
            patch.object(RealWeights, "values_at", values_at),
            profile(activities=[ProfilerActivity.CPU]) as profiled,
        ):
            for _ in range(5):
                self()
        events = profiled.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        spent = {
            "layers": sum(event.self_cpu_time_total for event in events if any(word in event.key for word in PRODUCTS)),
            **{part: sum(each.cpu_time_total for each in events if each.key.startswith(PARTS[part])) for part in PARTS},
        }
        shares = {part: time / total for part, time in spent.items()}
        return {part: f"{share:.0%}" for part, share in {**shares, "rest": 1 - sum(shares.values())}.items()}

    def peak(self) -> int:
        """Return the peak number of bytes that a step allocates beyond its start."""
        self.optimizer.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self()
        now = most = 0
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most


PRODUCTS = ("convolution", "addmm", "aten::mm", "_TrainedLinear")
"""What the operators of layers have in their names."""
PARTS = {
    "reading weights, writing .grad": ("values_at", "autograd::engine::evaluate_function: IndexSelect"),
    "optimiser": ("Optimizer.step",),
}
"""How the names of other parts of a step begin, with everything that they call."""


def _break_even(times: Mapping[float, float], dense: float) -> str:
    """Return the share at which the line through the times meets the dense time."""
    for (low, first), (high, second) in pairwise(sorted(times.items())):
        if first <= dense < second:
            return f"{low + (high - low) * (dense - first) / (second - first):.0%}"
    return f"over {max(times):.0%}" if max(times.values()) <= dense else f"under {min(times):.0%}"


def _times(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    return median_times(ways, rounds, torch.device("cpu"), time.process_time)


if __name__ == "__main__":
    main()
