"""densify: turns sparse weights into plain parameters again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from dnw_graph._compat import remove_hooks
from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.sparse_layers.access import sparse_parameters
from dnw_graph.sparse_layers.forward_pass import ForwardPass, RealWeights, part
from dnw_graph.sparse_layers.layers import own_parameters
from dnw_graph.sparse_layers.state import before_loading
from dnw_graph.wirings import NM


@checked
def densify(module: nn.Module, *, keep_hallucinated: bool = False, semi_structured: bool = False) -> None:
    """Make the weights of a module plain, dense parameters again, in place and as the same objects.

    Layers that share a ranking with layers outside the module leave that ranking; the layers outside keep their edges.

    Args:
        module: A module with sparse weights in it.
        keep_hallucinated: Keep the values of hallucinated weights instead of zeros.
        semi_structured: For inference on a GPU: replace the weights of linear layers of which ``"nm"`` keeps 2 of 4 by
            tensors of ``torch.sparse.to_sparse_semi_structured``, whose products skip the zeros. They must be float16
            or bfloat16; those of a size that PyTorch does not support, and convolutions, stay dense.

    Raises:
        InputError: If there is no sparse weight, or none that can become semi-structured.
    """
    found = {real: (layer, name) for _, layer, name, real in sparse_parameters(module)}
    if not found:
        raise InputError(f"{type(module).__name__} has no sparse weight: nothing to make dense")
    for real in found:
        real.current = None  # Of a forward pass that was interrupted.
    converted = _semi_structured(found) if semi_structured else {}
    part(list(found))
    graphs = {graph for real in found for _, graph in real.parts}
    for updates in {graph.updates for graph in graphs} - {None}:
        updates.release(graphs)
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
    for layer, weight in converted.items():
        layer.weight = nn.Parameter(weight, requires_grad=False)


def _semi_structured(found: Mapping[RealWeights, tuple[nn.Module, str]]) -> dict[nn.Module, Tensor]:
    """Return the weights that PyTorch's kernels for 2 of 4 support, by layer."""
    converted: dict[nn.Module, Tensor] = {}
    reason = "no linear layer in float16 or bfloat16 has wiring='nm' with 2 of 4"
    for real, (layer, name) in found.items():
        rule = real.parts[0][1].wiring
        suits = isinstance(layer, nn.Linear) and isinstance(rule, NM) and (rule.n, rule.m) == (2, 4)
        # In float32 these kernels expect 1 of 2.
        if suits and real.parts[0][0].parameter.dtype in (torch.float16, torch.bfloat16):
            try:
                converted[layer] = to_sparse_semi_structured(getattr(layer, name).detach())
            except RuntimeError as error:  # the device or the size
                reason = str(error)
    if not converted:
        raise InputError(f"no weight can become semi-structured: {reason}")
    return converted


def _make_plain(layer: nn.Module, name: str, order: Sequence[str]) -> None:
    """Undo ``register_parametrization`` without affecting copies of the layer, which share its class."""
    chains: Any = layer.parametrizations
    shared, parameter = type(layer), chains[name].original
    del chains[name]
    if len(chains):
        own = {**vars(shared), **shared.before_sparse}  # type: ignore[attr-defined]
        layer.__class__ = type(shared.__name__, shared.__bases__, {key: own[key] for key in own.keys() - {name}})
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
