"""Finds the channels of a model's layers that are nodes of a graph, and whether they are live."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor, nn

from dnw_graph.analysis.chains import reading_graphs
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.node_functions import Blockwise


def live_channels(model: nn.Module, live: Mapping[NeuralGraph, Tensor]) -> dict[nn.Module, list[Tensor]]:
    """Return, for every layer whose channels are nodes of a graph, their live masks, one per use."""
    channels: dict[nn.Module, list[Tensor]] = {}
    for graph, mask in live.items():
        for function, nodes in chain.from_iterable(_parts(*each) for each in graph.dynamics.functions()):
            for module in function.modules():
                channels.setdefault(module, []).append(mask[nodes.start : nodes.stop])
    for layer, graph in reading_graphs(model).items():
        if not isinstance(layer, NeuralGraph):
            channels[layer] = [live[graph][: graph.num_inputs]]
    return channels


def classifier_columns(model: nn.Module) -> dict[nn.Module, Tensor]:
    """Return, for every classifier that reads a graph's outputs, which of these have an incoming real edge."""
    columns: dict[nn.Module, Tensor] = {}
    for module in model.modules():
        graphs = [graph for graph in module.modules() if isinstance(graph, NeuralGraph)]
        if not graphs:
            continue
        layer, last = getattr(module, "classifier", None), graphs[-1]
        if isinstance(layer, nn.Linear) and layer.in_features == last.num_outputs:
            target = last.edge_index[1]
            reached = torch.zeros(last.num_nodes, dtype=torch.bool, device=target.device)
            reached[target] = True
            columns[layer] = reached[-last.num_outputs :]
    return columns


def _parts(function: nn.Module, nodes: range) -> list[tuple[nn.Module, range]]:
    """Return the node functions of a group of nodes, each with its own nodes."""
    if not isinstance(function, Blockwise):
        return [(function, nodes)]
    bounds = accumulate(function.sizes, initial=nodes.start)
    return [(part, range(*ends)) for part, ends in zip(function.functions, pairwise(bounds), strict=True)]
