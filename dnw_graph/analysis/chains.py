"""Finds chains of modules: layers and graphs that feed a single graph and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import TypeGuard, TypeVar

from torch import nn

from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.node_functions import Biased, NodeConv
from dnw_graph.usual import keeps_methods

M = TypeVar("M", bound=nn.Module)

CHANNEL_WISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm2d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d),
    NodeConv,
)
"""Modules that treat every channel of maps ``[batch, channels, height, width]`` separately, for any options."""


def channel_wise(module: nn.Module) -> bool:
    """Return whether a module treats every channel separately; False for subclasses and patched modules."""
    if _runs_as(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels
    if _runs_as(module, Biased):
        return channel_wise(module.activation)
    return type(module) in CHANNEL_WISE and keeps_methods(module)


def parts(module: nn.Module) -> list[nn.Module] | None:
    """Return the modules that a module applies in sequence, or None if unknown.

    They are known for an ``nn.Sequential``, and for modules with a method ``modules_in_order``, unless a subclass
    overrides the forward pass.
    """
    kind = type(module)
    if not keeps_methods(module):
        return None
    if isinstance(module, nn.Sequential):
        return list(module) if kind.forward is nn.Sequential.forward else None
    for parent in kind.__mro__:
        if "modules_in_order" in vars(parent):
            return module.modules_in_order()  # type: ignore[operator]
        if "forward" in vars(parent):
            return None
    return None


def reading_graphs(model: nn.Module) -> dict[nn.Module, NeuralGraph]:
    """Return, for each graph or layer whose output channels feed only the inputs of one graph, that graph."""
    uses = _uses(model)
    found: dict[nn.Module, NeuralGraph] = {}

    def walk(module: nn.Module, reader: NeuralGraph | None) -> NeuralGraph | None:
        """Given the graph that reads a module's output, return the one that reads its input."""
        chain = parts(module)
        if chain is not None:
            reader = reader if uses[module] <= 1 else None
            for part in reversed(chain):
                reader = walk(part, reader)
            return reader
        if reader is not None and uses[module] <= 1 and _num_channels(module) == reader.num_inputs:
            found[module] = reader
        if isinstance(module, NeuralGraph):
            known = _runs_as(module, NeuralGraph) and module.dynamics.node_dim == 1
            return module if known else None
        # If flattening keeps the number of channels, each channel is one value.
        return reader if channel_wise(module) or type(module) is nn.Flatten else None

    for module in model.modules():
        walk(module, None)
    return found


def _uses(model: nn.Module) -> Counter[nn.Module]:
    """Return the number of places of each module; a module inside a shared one has one place."""
    paths = dict(model.named_modules(remove_duplicate=False))
    ends = ((path.rpartition("."), module) for path, module in paths.items() if path)
    return Counter({(paths[parent], name): module for (parent, _, name), module in ends}.values())


def _runs_as(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Return whether a module is of a class and uses its forward pass."""
    return isinstance(module, kind) and type(module).forward is kind.forward and keeps_methods(module)


def _num_channels(module: nn.Module) -> int | None:
    if isinstance(module, NeuralGraph):
        return module.num_outputs
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    return getattr(module, "num_features", None) if type(module) in CHANNEL_WISE else None  # norms
