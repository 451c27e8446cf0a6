"""Finds out whether a layer uses its weight unchanged, by following the weight through a forward pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph._compat import TorchDispatchMode, tree_leaves
from dnw_graph.errors import InputError
from dnw_graph.sparse_layers.layers import LayerWeight, registered
from dnw_graph.usual import keeps_methods

PRODUCTS = frozenset(
    (
        *("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "matmul", "_native_multi_head_attention"),
        *("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "mkldnn_convolution", "_conv_depthwise2d"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    )
)
"""Operators that multiply each weight with the inputs of its connection."""
REARRANGED = frozenset(
    (
        *("t", "transpose", "permute", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand"),
        *("as_strided", "clone", "_to_copy", "detach", "alias", "slice", "select", "split", "split_with_sizes"),
        *("chunk", "unbind", "cat"),
    )
)
"""Operators that return the same values in another order, shape or type."""
SCALED = frozenset(("mul", "div"))
"""Operators that preserve zeros, as long as the other factor does not depend on the weight."""


def refuse_other_values(weight: LayerWeight) -> None:
    """Refuse the weight of a layer that computes with other values, so that zeros might not stay zero.

    Layers that standardise or normalise their weight are examples. A layer with the methods of its registered type uses
    its weight unchanged; any other is tested with a copy on a small batch.

    Raises:
        InputError: If the layer uses other values, or if that cannot be determined.
    """
    layer, kind = weight.layer, registered(weight.layer)
    assert kind is not None
    if keeps_methods(layer) and _same_methods(type(layer), kind):
        return
    name = type(layer).__name__
    dense = f"skip={name} leaves such layers dense"
    twin = copy.deepcopy(layer).to("cpu", torch.float32).eval()
    watch = _Watch(dict(twin.named_parameters(recurse=False))[weight.parameter_name])
    try:
        with torch.no_grad(), torch.device("cpu"), watch:
            twin.forward(*_inputs(weight))
    except Exception as error:  # The forward pass of a user's layer can raise anything.
        watch.other = watch.other or " ".join(str(error).split())[:100]
    if watch.other or not watch.used:
        raise InputError(
            f"{weight.name}: a {name} may not use its weight unchanged, so zeros might not stay zero "
            f"({watch.other or 'it does not use it'}): {dense}, register_layer({name}) asserts that they do"
        )


def _same_methods(own: type[nn.Module], kind: type[nn.Module]) -> bool:
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    names = {name for each in classes for name, value in vars(each).items() if callable(value)}
    return all(getattr(own, name) is getattr(kind, name) for name in names)


class _Watch(TorchDispatchMode):
    """Follows a weight through the operators of a forward pass.

    Attributes:
        used: Whether it was multiplied with inputs.
        other: The first operator that computed other values from it, or wrote to it; empty if there is none.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._same = {id(weight): weight}
        self.used, self.other = False, ""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call an operator."""
        out = func(*args, **(kwargs or {}))
        weights = [each for each in tree_leaves((args, kwargs)) if id(each) in self._same]
        if not weights:
            return out
        name = str(func).split(".")[1]
        if name in PRODUCTS:
            self.used = True
        elif name in REARRANGED or (name in SCALED and len(weights) == 1 and (name == "mul" or weights[0] is args[0])):
            self._same |= {id(each): each for each in tree_leaves(out)}
        else:
            self.other = self.other or f"{name} of its weight"
        return out


def _inputs(weight: LayerWeight) -> list[Tensor]:
    """Return inputs for a layer: maps at least as large as its kernel, or vectors."""
    layer = weight.layer
    if isinstance(layer, nn.MultiheadAttention):
        return [torch.ones(2, 1, size) for size in (layer.embed_dim, layer.kdim, layer.vdim)]
    dilation = getattr(layer, "dilation", (1,) * len(weight.kernel))
    sides = (2 + step * (size - 1) for size, step in zip(weight.kernel, dilation, strict=True))
    return [torch.ones(2, weight.channels[0], *sides)]
