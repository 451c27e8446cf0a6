"""Finds and reads the sparse weights of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from dnw_graph._compat import import_pyg
from dnw_graph.arguments import checked
from dnw_graph.candidates import split_index
from dnw_graph.errors import unknown_name
from dnw_graph.nodes import Nodes, reaching
from dnw_graph.sparse_layers.forward_pass import RealWeights
from dnw_graph.sparse_layers.layers import LayerWeight, weight_name
from dnw_graph.sparse_layers.weight_graph import WeightGraph
from dnw_graph.wirings import wiring_name

if TYPE_CHECKING:
    import torch_geometric.data


def sparse_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, RealWeights]]:
    """Yield every sparse parameter: the path of its layer, the layer, its name there, and its parametrization.

    A layer with two paths in the module is yielded twice.
    """
    for path, layer in module.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(layer):
            for name, chain in layer.parametrizations.items():
                if isinstance(chain[0], RealWeights):
                    yield path, layer, name, chain[0]


def sparse_chain(layer: nn.Module, name: str) -> Any:
    """Return the parametrizations of a layer's parameter if the first one makes it sparse, else None."""
    if not parametrize.is_parametrized(layer, name):
        return None
    chain: Any = layer.get_submodule(f"parametrizations.{name}")
    return chain if isinstance(chain[0], RealWeights) else None


def sparse_weights(module: nn.Module) -> dict[str, tuple[LayerWeight, WeightGraph]]:
    """Return every sparse weight and its graph by the weight's name in this module, which may be part of a larger one.

    A layer with two paths in the module has two names.
    """
    return {
        weight_name(f"{path}.{name}" if path else name, weight.third): (weight, graph)
        for path, _, name, real in sparse_parameters(module)
        for weight, graph in real.parts
    }


@checked
def weight_graphs(module: nn.Module) -> dict[str, WeightGraph]:
    """Return the graphs of a module's sparse weights by name: one per weight, or a single one with ``"global"``.

    The graph of a single weight is listed under every name of the weight in this module, one per path to its layer. The
    graph of all layers is ``"all layers"``. If several parts were sparsified, each with ``"global"``, further graphs
    have the name of their first weight.
    """
    graphs: dict[str, WeightGraph] = {}
    for name, (_, graph) in sparse_weights(module).items():
        if len(graph.weights) == 1:
            graphs[name] = graph
        elif graph not in graphs.values():
            graphs[name if graph.name in graphs else graph.name] = graph
    return graphs


@checked
def to_data(module: nn.Module, name: str) -> torch_geometric.data.Data:
    """Return the real weights of one layer as a bipartite PyG graph.

    Nodes are channels: first the input channels, then the output channels. Each real weight is an edge; a convolution
    can have parallel edges, one per position in its kernel.

    The :class:`~torch_geometric.data.Data` holds ``edge_index [2, k]``, ``edge_weight [k]``, ``kernel_position
    [k, dims]`` (the position in the kernel; no dims for a matrix), and for every node ``block`` (0 input, 1 output),
    ``pos [nodes, 2]``, ``input_mask``, ``output_mask`` and ``live_mask`` (an output, or an input with an edge). For
    pictures it also holds ``candidate_blocks``, ``name``, ``rule`` and ``dynamics``, as for a neural graph, and
    ``places``, the number of positions in the kernel. All tensors are on the CPU.

    Args:
        module: A module with sparse weights.
        name: Name of a weight in the module, as in the table of :func:`sparsify`.

    Raises:
        InputError: If there is no sparse weight of that name.
    """
    found = sparse_weights(module)
    if name not in found:
        raise unknown_name("sparse weight", name, found)
    weight, graph = found[name]
    index = split_index(graph.real_index, graph.weights)[graph.weights.index(weight)]
    source, target, place = weight.channel_pairs(index.cpu())
    inputs, outputs = weight.channels
    nodes = Nodes.in_blocks((inputs, outputs)).attributes()
    edge_index = torch.stack([source, inputs + target])
    per_input, per_output = inputs // weight.groups, outputs // weight.groups
    starts = range(0, inputs, per_input), range(0, outputs, per_output)
    return import_pyg().data.Data(
        edge_index=edge_index,
        edge_weight=graph.wiring.values(weight.flat(weight.parameter))[index].detach().cpu(),
        kernel_position=place,
        num_nodes=inputs + outputs,
        **nodes,
        live_mask=reaching(edge_index, nodes["output_mask"]),
        candidate_blocks=torch.tensor(
            [[(a, a + per_input, inputs + b, inputs + b + per_output) for a, b in zip(*starts, strict=True)]],
            device="cpu",
        ),
        name=name,
        rule=wiring_name(type(graph.wiring)),
        dynamics="layers",
        places=weight.kernel.numel(),
    )
