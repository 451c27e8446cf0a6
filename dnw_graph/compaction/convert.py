"""Converts a neural graph to layers of a compact model."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from dnw_graph.compaction.dynamic_graphs import TABLEAUS, ContinuousGraph, DiscreteGraph, RungeKuttaGraph, Step
from dnw_graph.compaction.functions import WholeFunction, sending_steps, steps
from dnw_graph.compaction.fusion import fold
from dnw_graph.compaction.plain_layers import Activation, Chain, Conv, Layer, Select
from dnw_graph.compaction.products import DenseProduct, Product, SparseProduct
from dnw_graph.compaction.static_graphs import StaticGraph
from dnw_graph.dynamics import Continuous, Discrete, Dynamics, Static
from dnw_graph.dynamics.continuous import EXPLICIT
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.nodes import reaching
from dnw_graph.usual import as_its_class


def needed_nodes(graph: NeuralGraph, wanted: Int[Tensor, " outputs"] | None) -> Bool[Tensor, " nodes"]:
    """Return the nodes that a compact graph needs: live ones, and all nodes of node functions that cannot be cut.

    Args:
        graph: The graph.
        wanted: The outputs that count, by their index among the outputs. Default: all.
    """
    outputs = torch.arange(graph.num_nodes - graph.num_outputs, graph.num_nodes, device=graph.edge_index.device)
    live = torch.zeros(graph.num_nodes, dtype=torch.bool, device=outputs.device)
    live[outputs if wanted is None else outputs[wanted]] = True
    together = [nodes for function, nodes in graph.dynamics.functions() if not _can_be_cut(graph, function)]

    def widen(live: Tensor) -> None:
        for nodes in together:
            part = live[nodes.start : nodes.stop]
            part |= part.any()

    live = reaching(graph.edge_index, live, widen)
    if not live[: graph.num_inputs].any():
        live[0] = True  # The inputs determine the sizes of batch and maps.
    return live


def can_be_compacted(module: nn.Module) -> bool:
    """Return whether a module is a graph with dynamics of this package, without patches and hooks."""
    return type(module) is NeuralGraph and why_not(module) is None


def why_not(graph: NeuralGraph) -> str | None:
    """Return why a graph cannot be compacted, in words, or None."""
    if type(graph) is not NeuralGraph or type(graph.dynamics) not in (Static, Discrete, Continuous):
        return f"a {type(graph).__name__} with {type(graph.dynamics).__name__} dynamics"
    usual = as_its_class(graph) and as_its_class(graph.dynamics)
    return None if usual else "a graph with hooks or with a patched method"


def is_adaptive(dynamics: Dynamics) -> bool:
    """Return whether the steps of a solver depend on the states of all nodes."""
    return isinstance(dynamics, Continuous) and dynamics.method not in EXPLICIT


def whole_functions(graph: NeuralGraph) -> list[str]:
    """Return which node functions cannot be cut to single nodes, in words."""
    return [
        f"{graph.name}: {type(function).__name__}, with all {len(nodes):,} nodes, cannot be cut to single nodes"
        for function, nodes in graph.dynamics.functions()
        if not _can_be_cut(graph, function)
    ]


class GraphConverter:
    """The layers of one graph.

    Args:
        graph: The graph.
        live: The nodes to keep.
        wanted: The outputs that count, by their index among the outputs, or None for all.
        sparse: Whether products are sparse.
    """

    def __init__(self, graph: NeuralGraph, live: Tensor, wanted: Tensor | None, sparse: bool) -> None:
        self.graph = graph
        self.sparse = sparse
        self.source, self.target = graph.edge_index
        self.weight = graph.edge_weight
        self.live = live.nonzero().flatten()
        self.inputs = self.live[self.live < graph.num_inputs]
        places = torch.arange(graph.num_outputs, device=live.device) if wanted is None else wanted
        self.outputs = places + graph.num_nodes - graph.num_outputs

    def layers(self) -> list[nn.Module]:
        """Return the layers, from the states of the kept inputs to the wanted outputs."""
        dynamics = self.graph.dynamics
        if isinstance(dynamics, Static):
            return self._static(dynamics)
        if isinstance(dynamics, Discrete):
            return self._discrete(dynamics)
        assert isinstance(dynamics, Continuous)
        return self._continuous(dynamics)

    def product(self, have: Tensor, want: Tensor) -> Product:
        """Return the product from the states of some nodes to the inputs of others."""
        place = torch.full((2, self.graph.num_nodes), -1, device=self.source.device)
        place[0, have] = torch.arange(len(have), device=have.device)
        place[1, want] = torch.arange(len(want), device=want.device)
        source, target = place[0, self.source], place[1, self.target]
        used = (source >= 0) & (target >= 0)
        source, target, weight = source[used], target[used], self.weight[used]
        bias = weight.new_zeros(len(want))
        if not self.sparse:
            matrix = weight.new_zeros(len(want), len(have))
            matrix[target, source] = weight
            return DenseProduct(matrix, bias)
        order = (target * len(have) + source).argsort()
        rowptr = torch.searchsorted(target[order], torch.arange(len(want) + 1, device=target.device))
        return SparseProduct(rowptr.int(), source[order].int(), weight[order], bias, len(have))

    def _static(self, dynamics: Static) -> list[nn.Module]:
        ranges = self.graph.nodes.block_ranges
        kept = [self.live[(self.live >= nodes.start) & (self.live < nodes.stop)] for nodes in ranges]

        def function(block: int) -> list[nn.Module]:
            known = steps(dynamics.node_functions[block])
            if known is None:
                return [WholeFunction(copy.deepcopy(dynamics.node_functions[block]))]
            return [layer.cut(kept[block] - ranges[block].start) for layer in known]

        products: list[Product] = []
        chains: list[nn.Module] = []
        feeding: list[tuple[int, int]] = []
        number = [sum(bool(len(part)) for part in kept[:block]) for block in range(len(kept) + 1)]
        starts = {nodes.start: block for block, nodes in enumerate(ranges)} | {ranges[-1].stop: len(ranges)}
        for block, part in enumerate(kept[1:], start=1):
            if not len(part):
                continue
            sources = self.graph.candidates.blocks[block - 1].sources
            first, last = starts[sources.start], starts[sources.stop]
            # If all sources are dead, the inputs still give the size of the maps.
            first, last = (first, last) if number[first] < number[last] else (0, 1)
            product = self.product(torch.cat(kept[first:last]), part)
            feeding.append((number[first], number[last]))
            products.append(product)
            if block < len(kept) - 1:
                _, *rest = fold([product, *function(block)])
                chains.append(Chain(rest))
        # A function that cannot be cut computes all outputs, wanted or not.
        wanted = [] if len(kept[-1]) == len(self.outputs) else self._select(kept[-1])
        return [*function(0), StaticGraph(products, chains, feeding), *function(len(kept) - 1), *wanted]

    def _discrete(self, dynamics: Discrete) -> list[nn.Module]:
        functions = list(dynamics.node_functions)
        schedule = [time % len(functions) for time in range(dynamics.steps or 1)]
        if dynamics.input_mode == "sequence" or not all(_can_be_cut(self.graph, f) for f in functions):
            full = [self._step(function, self.live, self.live) for function in functions]
            sequence = dynamics.input_mode == "sequence"
            graph = DiscreteGraph(full, None if sequence else schedule, dynamics.input_mode, len(self.live))
            chosen = [] if len(self.inputs) == self.graph.num_inputs or not sequence else [Select(self.inputs, dim=2)]
            return [*chosen, graph, *self._select(self.live)]
        # Only the inputs are non-zero before the first step, so that the others send nothing unless a convolution has a
        # bias, and only the outputs are needed after the last one.
        made: dict[tuple[int, bool, bool], int] = {}
        parts: list[Step] = []
        order: list[int] = []
        for time, number in enumerate(schedule):
            key = (number, time == 0 and _sends_zero(functions[number]), time == len(schedule) - 1)
            if key not in made:
                made[key] = len(parts)
                have = self.inputs if key[1] else self.live
                want = self.outputs if key[2] else self.live
                parts.append(self._step(functions[number], have, want))
            order.append(made[key])
        return [DiscreteGraph(parts, order, dynamics.input_mode, parts[order[0]].num_inputs)]

    def _continuous(self, dynamics: Continuous) -> list[nn.Module]:
        step = self._step(dynamics.node_function, self.live, self.live)
        if dynamics.method not in TABLEAUS or set(dynamics.options) - {"step_size"}:
            solver = (dynamics.method, dynamics.rtol, dynamics.atol, dynamics.options, dynamics.t_span)
            return [ContinuousGraph(step, *solver), *self._select(self.live)]
        times = list(dynamics.t_span)
        if size := dynamics.options.get("step_size"):
            times = _steps_of(size, self.weight.new_tensor(times)).tolist()
        return [RungeKuttaGraph(step, dynamics.method, times), *self._select(self.live)]

    def _step(self, function: nn.Module, have: Tensor, want: Tensor) -> Step:
        product = self.product(have, want)
        sends, receives = sending_steps(function), steps(function)
        if sends is None or receives is None:
            return Step(Chain([]), product, WholeFunction(copy.deepcopy(function)))
        _, *rest = fold([product, *(layer.cut(want) for layer in receives)])
        return Step(Chain([layer.cut(have) for layer in sends]), product, Chain(rest))

    def _select(self, nodes: Tensor) -> list[Layer]:
        """Return the layer that selects the wanted outputs from the states of some nodes."""
        return [Select(torch.searchsorted(nodes, self.outputs))]


def _steps_of(size: float, times: Tensor) -> Tensor:
    """Return the step bounds of torchdiffeq's one-step solvers: steps of equal size, the last one shorter."""
    start, end = times
    count = int(((end - start).abs() / size + 1).ceil())
    grid = start + torch.sign(end - start) * size * torch.arange(count, dtype=times.dtype, device=times.device)
    grid[-1] = end
    return grid


def _sends_zero(function: nn.Module) -> bool:
    """Return whether nodes whose state is zero certainly send zero."""
    return all(
        (isinstance(layer, Activation) and layer.name == "relu") or (isinstance(layer, Conv) and layer.bias is None)
        for layer in sending_steps(function) or []
    )


def _can_be_cut(graph: NeuralGraph, function: nn.Module) -> bool:
    sent = isinstance(graph.dynamics, Static) or sending_steps(function) is not None
    return sent and steps(function) is not None
