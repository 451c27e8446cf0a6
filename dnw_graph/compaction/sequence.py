"""Models as sequences of modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnw_graph.analysis.chains import parts
from dnw_graph.compaction.convert import can_be_compacted
from dnw_graph.compaction.functions import steps
from dnw_graph.compaction.plain_layers import Activation, Affine, Layer, MapMean
from dnw_graph.dynamics import Static
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.usual import as_its_class


def chain(model: nn.Module) -> list[nn.Module]:
    """Return the modules that a model applies in sequence, or the model alone."""
    modules = parts(model) if as_its_class(model) else None
    if modules is None:
        return [model]
    flat = [part for module in modules for part in chain(module)]
    for place in reversed(range(len(flat) - 1)):
        pool, flatten = flat[place : place + 2]
        if not (as_its_class(pool) and as_its_class(flatten)):
            continue
        pooled = isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1))
        if pooled and isinstance(flatten, nn.Flatten) and (flatten.start_dim, flatten.end_dim) == (1, -1):
            flat[place : place + 2] = [MapMean()]
    return flat


def silent_features(modules: list[nn.Module]) -> Tensor | None:
    """Return the values of features that are the same for all images, and NaN for others; None if there are none.

    Such a feature is the mean over the map of an output without input edges, possibly after element-wise layers.
    """
    between: list[Layer] = []
    for module in reversed(modules):
        known = steps(module)
        if known is not None and all(isinstance(layer, Affine | Activation | MapMean) for layer in known):
            between = known + between
            continue
        break
    else:
        return None
    means = [layer.stop or 1 for layer in between if isinstance(layer, MapMean)]
    if not (
        means and isinstance(module, NeuralGraph) and can_be_compacted(module) and isinstance(module.dynamics, Static)
    ):
        return None
    if steps(module.dynamics.node_functions[-1]) != []:
        return None
    silent = module.silent_nodes()[-module.num_outputs :]
    silent[0] &= not silent.all()  # Keep one feature, which gives the batch size.
    if not silent.any():
        return None
    z = module.edge_weight.new_zeros(1, module.num_outputs, max(means), max(means))
    for layer in between:
        z = layer(z)
    return z[0].masked_fill(~silent, torch.nan)
