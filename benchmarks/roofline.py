"""The least time that a training step can take on a machine: a roofline over fused groups of operations.

A group takes at least max(FLOPs / peak, bytes / bandwidth), with the peak of square matrix products in the dtype of the
step and the bandwidth of a copy, both measured here; the floor of a step is the sum over its groups. A multiply-add is
two FLOPs. Products and convolutions are counted; norms, ReLU and sums are not.

Bytes are those of the algorithm's tensors, once per necessary read and write: node inputs I, states Z, their gradients
and the candidate weights. The groups of a graph are:

- *product*: reads the sources' Z and the real edges (a weight and an index of 4 bytes each), writes I. Statistics for a
  norm are taken while I is written.
- *node function*: writes Z. A batch norm needs the statistics of the whole batch before it can normalise, so I is read
  again; an instance norm needs one map, and is assumed to happen within the product, which keeps I for the backward
  pass.
- *backward of states*, for each group of sources: reads ∂L/∂I of all its targets and gathers ∂L/∂Z. Instance norm: also
  reads I and writes ∂L/∂I. Batch norm: two sums over the batch come first, so one pass reads I and writes ∂L/∂Z,
  another reads both and writes ∂L/∂I. The depthwise convolution costs twice the FLOPs of its forward pass.
- *candidate gradient*: a dense product of 2 · targets · sources · batch · pixels FLOPs that reads ∂L/∂I and Z and
  writes the gradient; for a rule that trains some candidates, FLOPs and gradient of these only.
- *selection*: reads the candidate weights.
- *solver* of a continuous graph: reads the states that it combines and writes one, in both passes.

Outside the graphs, convolutions and linear layers read and write their maps in each of forward pass, gradient of the
input and gradient of the weight; norms, ReLU and pooling in a row are one group, with two backward passes. The
*optimiser* reads parameter, gradient and momentum and writes parameter and momentum.

In discrete and continuous time all states but the inputs' are zero at first; after the last discrete step only the
outputs are needed. In continuous time every evaluation of the forward pass is counted, with a backward pass.

The bandwidth is that of main memory; if tensors stay in a cache, a step can be faster than this floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from reference_formulation import graphs_of
from timing import median_times
from torch import Tensor, nn

from dnw_graph import Continuous, Discrete, NeuralGraph
from dnw_graph.analysis.multiply_adds import edges_between, layer_multiply_adds
from dnw_graph.node_functions import NodeConv
from dnw_graph.ops.dense import product_with_transpose

PARAMETER = 4  # bytes: parameters, gradients and momentum are float32 under autocast too
EDGE = PARAMETER + 4
# The six evaluations of a step of dopri5 start from the state and 1, 2, … 6 slopes.
SOLVER_READS = sum(range(2, 8)) / 6


@dataclass(frozen=True)
class Machine:
    """The limits of a device.

    Attributes:
        peak: FLOP/s.
        bandwidth: Bytes per second.
    """

    peak: float
    bandwidth: float

    def milliseconds(self, operations: float, moved: float) -> float:
        """Return the least time for a number of FLOPs and of bytes read and written."""
        return 1e3 * max(operations / self.peak, moved / self.bandwidth)


@dataclass(frozen=True)
class Group:
    """Operations that one kernel could do.

    Attributes:
        part: Name of the graph or other part.
        kind: Kind of operation.
        operations: Number of FLOPs.
        moved: The least number of bytes read and written.
    """

    part: str
    kind: str
    operations: float
    moved: float

    def milliseconds(self, machine: Machine) -> float:
        """Return the least time that the group takes."""
        return machine.milliseconds(self.operations, self.moved)


def measure(device: torch.device, dtype: torch.dtype, rounds: int = 9) -> Machine:
    """Measure the largest rate of square matrix products, and that of a copy far larger than the caches.

    Args:
        device: Device; a CPU with PyTorch's current number of threads.
        dtype: Dtype of the products.
        rounds: Timed turns; the median is used.
    """
    sizes, length = ((4096, 8192), 2**30) if device.type == "cuda" else ((1024, 2048), 2**26)
    ways = {}
    for size in sizes:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        ways[f"{size}"] = partial(torch.mm, a, b, out=torch.empty_like(a))
        # On a CPU, another library may be faster.
        ways[f"{size}, transposed"] = partial(product_with_transpose, a, b)
    source, target = torch.ones(2, length, device=device)
    times = median_times({**ways, "copy": partial(target.copy_, source)}, rounds, device)
    copied = 2 * source.element_size() * length
    best = [2e3 * size**3 / min(times[f"{size}"], times[f"{size}, transposed"]) for size in sizes]
    return Machine(max(best), 1e3 * copied / times["copy"])


def floor(found: list[Group], machine: Machine) -> float:
    """Return the least time of all groups, in milliseconds."""
    return sum(group.milliseconds(machine) for group in found)


def groups(model: nn.Module, images: Tensor, dtype: torch.dtype, batch: int | None = None) -> list[Group]:
    """Return the groups of one training step, including SGD with momentum.

    Args:
        model: A model of this package, or a graph.
        images: A batch.
        dtype: Dtype of the maps.
        batch: Images per step. Default: those given.
    """
    sizes = _sizes(model, images)
    batch = images.size(0) if batch is None else batch
    found: list[Group] = []
    for graph in graphs_of(model):
        before, after = sizes.pop(graph)
        count = _Counter(graph, batch, dtype)
        if graph.dynamics.in_blocks:
            found += count.static(before // graph.num_inputs, after // graph.num_outputs)
        else:
            found += count.dynamic(before // graph.num_inputs)
        found.append(Group(graph.name, "selection", 0, PARAMETER * graph.num_candidates))
    found += _other_layers(sizes, batch * dtype.itemsize, batch)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [*found, Group("model", "optimiser", 0, 5 * PARAMETER * parameters)]


def summary(found: list[Group], machine: Machine) -> list[dict[str, object]]:
    """Return a row per part and kind, with its bound."""
    rows: list[dict[str, object]] = []
    for part, kind in dict.fromkeys((group.part, group.kind) for group in found):
        same = [group for group in found if (group.part, group.kind) == (part, kind)]
        operations, moved = sum(group.operations for group in same), sum(group.moved for group in same)
        computing = operations / machine.peak > moved / machine.bandwidth
        rows.append(
            {
                "part": part,
                "group": kind,
                "GFLOP": operations / 1e9,
                "MB": moved / 1e6,
                "floor, ms": floor(same, machine),
                "bound by": "peak" if computing else "bandwidth",
            }
        )
    return rows


class _Counter:
    """Counts the groups of one graph; sizes are numbers of nodes and of pixels."""

    def __init__(self, graph: NeuralGraph, batch: int, dtype: torch.dtype) -> None:
        self.graph, self.batch, self.map = graph, batch, batch * dtype.itemsize
        self.two_passes = any(isinstance(module, nn.BatchNorm2d) for module in graph.modules())
        self.source, self.target = graph.edge_index.cpu()
        learning = graph.learning_edges(graph.real_index, graph.tensors())
        self.learning = None if learning is None else graph.candidates.pairs(learning).cpu()
        self.kernel = next(module.weight for module in graph.modules() if isinstance(module, NodeConv))

    def static(self, before: int, places: int) -> Iterator[Group]:
        """Yield the groups of a static graph, given the number of pixels of its inputs' maps before the stride."""
        functions = [function for function, _ in self.graph.dynamics.functions()]
        candidates = self.graph.candidates.blocks
        for number, (function, nodes) in enumerate(zip(functions, self.graph.nodes.block_ranges, strict=True)):
            if number > 0:
                block = candidates[number - 1]
                yield from self.product(block.sources, block.targets, places)
            if not isinstance(function, nn.Identity):
                own = places if number > 0 else before
                fed = [block.targets for block in candidates if nodes.start in block.sources]
                yield from self.node_function(len(nodes), own, places, read_again=self.two_passes or number == 0)
                yield from self.backward(nodes, range(fed[0].start, fed[-1].stop), own, places)

    def dynamic(self, places: int) -> Iterator[Group]:
        """Yield the groups of a dynamic graph, evaluation by evaluation."""
        nodes, dynamics = self.graph.nodes, self.graph.dynamics
        if isinstance(dynamics, Continuous):
            evaluations = [(nodes.inputs, nodes.all), *[(nodes.all, nodes.all)] * (dynamics.num_evaluations - 1)]
            moved = self.map * nodes.num_nodes * places * (SOLVER_READS + 1)
            for kind in ("solver", "solver, backward"):
                yield Group(self.graph.name, kind, 0, moved * len(evaluations))
        else:
            assert isinstance(dynamics, Discrete)
            assert dynamics.steps
            have = [nodes.inputs, *[nodes.all] * (dynamics.steps - 1)]
            evaluations = list(zip(have, [*have[1:], nodes.outputs], strict=True))
        for sources, targets in evaluations:
            yield from self.product(sources, targets, places)
            yield from self.node_function(len(targets), places, places, read_again=self.two_passes)
            yield from self.backward(sources, targets, places, places)

    def product(self, sources: range, targets: range, places: int) -> Iterator[Group]:
        """Yield the product and the candidate gradient."""
        edges = self.edges(sources, targets)
        moved = self.map * places * (len(sources) + len(targets))
        yield self.group("product", edges * places, moved + EDGE * edges)
        pairs = len(sources) * len(targets)
        if self.learning is not None:
            pairs = edges_between(self.learning[0], self.learning[1], sources, targets)
        yield self.group("candidate gradient", pairs * places, moved + PARAMETER * pairs)

    def node_function(self, nodes: int, before: int, places: int, read_again: bool) -> Iterator[Group]:
        """Yield the forward pass of a node function."""
        convolved = layer_multiply_adds(self.kernel, nodes * places)
        yield self.group("node function", convolved, self.map * nodes * (read_again * before + places))

    def backward(self, sources: range, targets: range, before: int, places: int) -> Iterator[Group]:
        """Yield the gradient of states and the backward pass of the node function that made them."""
        multiply_adds = self.edges(sources, targets) * places
        multiply_adds += 2 * layer_multiply_adds(self.kernel, len(sources) * places)
        # I and ∂L/∂I have the pixels before the stride; ∂L/∂Z, written and read again, those after it.
        own = 3 * before + 2 * places if self.two_passes else 2 * before
        moved = self.map * (len(targets) * places + len(sources) * own)
        yield self.group("backward of states", multiply_adds, moved)

    def edges(self, sources: range, targets: range) -> int:
        """Return the number of real edges from some nodes to others."""
        return edges_between(self.source, self.target, sources, targets)

    def group(self, kind: str, multiply_adds: int, moved: float) -> Group:
        """Return a group with a number of multiply-adds per image."""
        return Group(self.graph.name, kind, 2 * self.batch * multiply_adds, moved)


def _other_layers(sizes: dict[nn.Module, tuple[int, int]], element: int, batch: int) -> Iterator[Group]:
    """Yield the groups outside the graphs, given the values that each layer reads and writes per image."""
    layers = list(sizes)
    for number, layer in enumerate(layers):
        read, written = sizes[layer]
        if isinstance(layer, nn.Conv2d | nn.Linear):
            operations = 2 * batch * layer_multiply_adds(layer.weight, written)
            # The gradient of the images is not needed.
            for kind in ("forward", "gradient of the weight", *["gradient of the input"] * (number > 0)):
                yield Group("other layers", kind, operations, element * (read + written))
        elif number == 0 or isinstance(layers[number - 1], nn.Conv2d | nn.Linear):
            row = next((i for i in range(number, len(layers)) if isinstance(layers[i], nn.Conv2d | nn.Linear)), None)
            written = sizes[layers[-1 if row is None else row - 1]][1]
            yield Group("other layers", "norm, ReLU, pool", 0, element * (read + written))
            yield Group("other layers", "norm, ReLU, pool, backward", 0, element * (3 * read + 2 * written))


def _sizes(model: nn.Module, images: Tensor) -> dict[nn.Module, tuple[int, int]]:
    """Return how many values per image each graph, and each layer outside the graphs, reads and writes."""
    graphs = graphs_of(model)
    inside = {part for graph in graphs for part in graph.modules()}
    outside = [part for part in model.modules() if part not in inside and not any(part.children())]
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes[module] = (inputs[0][0].numel(), output[0].numel())

    hooks = [part.register_forward_hook(note) for part in (*graphs, *outside)]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes
