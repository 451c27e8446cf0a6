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

    A model that chains its graphs knows which outputs count in a method ``live_nodes_by_graph()``; in any other
    model, and in a graph by itself, all outputs of a graph count.
    """
    chained = getattr(model, "live_nodes_by_graph", None)
    if chained is not None:
        return chained()
    return {name: graph.live_nodes() for name, graph in neural_graphs(model).items()}


def cost(model: nn.Module, input_size: tuple[int, ...]) -> Cost:
    """Count the parameters and multiply-adds of a model without its dead nodes.

    One image of zeros is sent through the model in evaluation mode to learn the sizes of the maps. A node function
    counts for its live nodes, and so does the last layer of the model's ``stem``, whose channels are the inputs of the
    first graph.

    Args:
        model: Any module of convolutions, linear layers and neural graphs.
        input_size: Size of one image, such as ``(3, 224, 224)``.
    """
    live = live_nodes(model)
    graphs = neural_graphs(model)
    places = _map_sizes(model, input_size)
    share = _live_shares(model, graphs, live)
    parameters = multiply_adds = 0.0
    for module in model.modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, nn.Conv2d | nn.Linear) and module in places:
            multiply_adds += module.weight.numel() * places[module] * share.get(module, 1.0)
        if not isinstance(module, CandidateEdges | _NormBase):
            parameters += own * share.get(module, 1.0)
    for name, graph in graphs.items():
        source, target = graph.edge_index
        edges = int((live[name][source] & live[name][target]).sum())
        parameters += edges
        multiply_adds += edges * places.get(graph, 0)
    return Cost(round(parameters), round(multiply_adds))


def _map_sizes(model: nn.Module, input_size: tuple[int, ...]) -> dict[nn.Module, int]:
    """Return the values per output map of every layer and graph, added up over its calls."""
    places: dict[nn.Module, int] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # A linear layer is applied at every place but the last dimension, a convolution or graph at each of a map.
        shape = output.shape[1:-1] if isinstance(module, nn.Linear) else output.shape[2:]
        places[module] = places.get(module, 0) + math.prod(shape)

    counted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | NeuralGraph)]
    handles = [module.register_forward_hook(hook) for module in counted]
    modes = {module: module.training for module in model.modules()}
    reference = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_size, dtype=reference.dtype, device=reference.device))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return places


def _live_shares(model: nn.Module, graphs: dict[str, NeuralGraph], live: dict[str, Tensor]) -> dict[nn.Module, float]:
    """Return the share of live channels of every layer whose channels are nodes of a graph."""
    shares: dict[nn.Module, float] = {}

    def note(function: nn.Module, mask: Tensor) -> None:
        shares.update(dict.fromkeys(function.modules(), float(mask.double().mean())))

    for name, graph in graphs.items():
        for function, nodes in graph.dynamics.functions():
            note(function, live[name][nodes.start : nodes.stop])
    stem = getattr(model, "stem", None)
    if graphs and isinstance(stem, nn.Module):
        name, graph = next(iter(graphs.items()))
        # Only the last layer's channels are nodes; the layers before it feed live and dead ones alike.
        for layer in [m for m in stem.modules() if isinstance(m, nn.Conv2d | nn.Linear)][-1:]:
            note(layer, live[name][: graph.num_inputs])
    return shares
