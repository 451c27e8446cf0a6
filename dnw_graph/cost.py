"""What a model costs: parameters and multiply-adds of its real edges and live nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dnw_graph.candidates import CandidateEdges
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.propagation import Propagate, Propagation, RealEdges


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    Attributes:
        parameters: Number of parameters: those of live real edges, live nodes and all other layers. Norms are not
            counted, as in the paper's figures, since they can be folded.
        multiply_adds: Multiply-adds of the convolutions, linear layers and edges for one image (the paper's FLOPs).
    """

    parameters: int
    multiply_adds: int


def neural_graphs(model: nn.Module) -> dict[str, NeuralGraph]:
    """Return the neural graphs of a model by name, in the order of the model.

    A graph whose name another one shares goes by its module path.
    """
    graphs = [(path, graph) for path, graph in model.named_modules() if isinstance(graph, NeuralGraph)]
    names = [graph.name for _, graph in graphs]
    return {graph.name if names.count(graph.name) == 1 else path: graph for path, graph in graphs}


def live_nodes(model: nn.Module) -> dict[str, Bool[Tensor, " nodes"]]:
    """Return, by graph name, which nodes reach an output of the model over real edges; the others are dead.

    A model that chains its graphs knows which outputs count in a method ``live_nodes_by_graph()``; in any other graph,
    all outputs count.
    """
    masks: dict[nn.Module, Tensor] = {}
    for module in model.modules():
        chained = getattr(module, "live_nodes_by_graph", None)
        if chained is not None:
            masks |= chained()
    return {
        name: masks[graph] if graph in masks else graph.live_nodes() for name, graph in neural_graphs(model).items()
    }


def cost(model: nn.Module, input_size: tuple[int, ...]) -> Cost:
    """Count the parameters and multiply-adds of a model without its dead nodes.

    One image of zeros is sent through the model in evaluation mode, and what is computed is counted: live real edges at
    every product, each step of a discrete graph and each evaluation of a continuous one; node functions at their live
    nodes; the last layer of a ``stem``, whose channels are the inputs of the first graph beside it, at the live ones.

    Args:
        model: Any module of convolutions, linear layers and neural graphs.
        input_size: Size of one image, such as ``(3, 224, 224)``.
    """
    live = live_nodes(model)
    graphs = neural_graphs(model)
    masks = _channel_masks(model, graphs, live)
    parameters = 0.0
    for module in model.modules():
        if not isinstance(module, CandidateEdges | _NormBase):
            own = sum(p.numel() for p in module.parameters(recurse=False))
            parameters += own * float(masks[module].double().mean()) if module in masks else own
    for name, graph in graphs.items():
        source, target = graph.edge_index
        parameters += int((live[name][source] & live[name][target]).sum())
    return Cost(round(parameters), _count_multiply_adds(model, input_size, masks, graphs, live))


def _count_multiply_adds(
    model: nn.Module,
    input_size: tuple[int, ...],
    masks: dict[nn.Module, Tensor],
    graphs: dict[str, NeuralGraph],
    live: dict[str, Tensor],
) -> int:
    total = 0

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        linear = isinstance(module, nn.Linear)
        # A linear layer is applied at every place but the last dimension, a convolution at every one of its map.
        places = math.prod(output.shape[1:-1] if linear else output.shape[2:])
        channels = output.size(-1 if linear else 1)
        if module in masks:
            nodes = args[1] if len(args) > 1 and args[1] is not None else range(channels)
            channels = int(masks[module][nodes.start : nodes.stop].sum())
        total += channels * module.get_parameter("weight")[0].numel() * places

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    modes = {module: module.training for module in model.modules()}
    counted = {name: _Counted(graph.propagation, live[name]) for name, graph in graphs.items()}
    reference = next(model.parameters())
    try:
        for name, graph in graphs.items():
            graph.propagation = counted[name]
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_size, dtype=reference.dtype, device=reference.device))
    finally:
        for name, graph in graphs.items():
            graph.propagation = counted[name].propagation
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return total + sum(each.multiply_adds for each in counted.values())


class _Counted(Propagation):
    """Another propagation, counting one multiply-add per live real edge and place."""

    def __init__(self, propagation: Propagation, live: Tensor) -> None:
        super().__init__()
        self.propagation = propagation
        self.live = live
        self.multiply_adds = 0

    def forward(self, edges: RealEdges) -> Propagate:
        propagate = self.propagation(edges)
        source, target = edges.candidates.pairs(edges.index)
        alive = self.live[source] & self.live[target]
        source, target = source[alive], target[alive]

        def product(number: int, z: Tensor, rows: slice, columns: slice) -> Tensor:
            block = propagate.blocks[number]
            sources, targets = block.sources[columns], block.targets[rows]
            used = (source >= sources.start) & (source < sources.stop)
            used &= (target >= targets.start) & (target < targets.stop)
            self.multiply_adds += int(used.sum()) * math.prod(z.shape[2:])
            return propagate.product(number, z, rows, columns)

        return Propagate(propagate.blocks, propagate.weights, product)


def _channel_masks(
    model: nn.Module, graphs: dict[str, NeuralGraph], live: dict[str, Tensor]
) -> dict[nn.Module, Tensor]:
    """Return, for every layer whose channels are nodes of a graph, which of them are live."""
    masks: dict[nn.Module, Tensor] = {}
    for name, graph in graphs.items():
        for function, nodes in graph.dynamics.functions():
            masks |= dict.fromkeys(function.modules(), live[name][nodes.start : nodes.stop])
    by_graph = {graph: live[name] for name, graph in graphs.items()}
    for module in model.modules():
        stem = getattr(module, "stem", None)
        inner = [graph for graph in module.modules() if isinstance(graph, NeuralGraph)]
        if inner and isinstance(stem, nn.Module):
            # Only the last layer's channels are nodes; the layers before it feed live and dead ones alike.
            for layer in [m for m in stem.modules() if isinstance(m, nn.Conv2d | nn.Linear)][-1:]:
                masks[layer] = by_graph[inner[0]][: inner[0].num_inputs]
    return masks
