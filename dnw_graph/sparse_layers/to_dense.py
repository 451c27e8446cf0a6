"""densify: turns sparse weights into plain parameters again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dnw_graph._compat import remove_hooks
from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.sparse_layers.access import sparse_parameters
from dnw_graph.sparse_layers.forward_pass import ForwardPass, part
from dnw_graph.sparse_layers.layers import own_parameters
from dnw_graph.sparse_layers.state import before_loading


@checked
def densify(module: nn.Module, *, keep_hallucinated: bool = False) -> None:
    """Make the weights of a module plain, dense parameters again, in place and as the same objects.

    Layers that share a ranking with layers outside the module leave that ranking; the layers outside keep their edges.

    Args:
        module: A module with sparse weights in it.
        keep_hallucinated: Keep the values of hallucinated weights instead of zeros.

    Raises:
        InputError: If there is no sparse weight.
    """
    found = {real: (layer, name) for _, layer, name, real in sparse_parameters(module)}
    if not found:
        raise InputError(f"{type(module).__name__} has no sparse weight: nothing to make dense")
    part(list(found))
    if not keep_hallucinated:
        with torch.no_grad():
            # Read all before changing any: layers can share a ranking.
            effective = [(real, getattr(layer, name)) for real, (layer, name) in found.items()]
            for real, weight in effective:
                real.parts[0][0].parameter.copy_(weight)
    for real, (layer, name) in found.items():
        real.active = False
        _make_plain(layer, name, real.order)
    for each in module.modules():
        remove_hooks(each, _is_ours)


def _make_plain(layer: nn.Module, name: str, order: Sequence[str]) -> None:
    """Undo ``register_parametrization`` without affecting copies of the layer, which share its class."""
    chains: Any = layer.parametrizations
    shared, parameter = type(layer), chains[name].original
    del chains[name]
    if len(chains):
        others = {key: value for key, value in vars(shared).items() if key != name}
        layer.__class__ = type(shared.__name__, shared.__bases__, others)
    else:
        del layer.parametrizations
        layer.__class__ = shared.__bases__[0]
    layer.register_parameter(name, parameter)
    own = dict(own_parameters(layer))
    for key in [key for key in order if key in own]:
        delattr(layer, key)
        layer.register_parameter(key, own[key])


def _is_ours(hook: Any) -> bool:
    return hook is before_loading or isinstance(getattr(hook, "__self__", None), ForwardPass)
