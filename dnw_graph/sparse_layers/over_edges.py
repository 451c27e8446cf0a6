"""The forward pass of a layer over its real weights alone, in place of the dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dnw_graph.ops.layout import plain_eager
from dnw_graph.sparse_layers.forward_pass import RealWeights


def over_edges(otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the forward pass of a linear layer or convolution with a sparse weight.

    Args:
        otherwise: The forward pass with a dense weight, used where edges do not pay.
    """

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        chain: Any = layer.parametrizations.weight  # type: ignore[union-attr]
        real: RealWeights = chain[0]
        edges = real.edges
        # A probe needs the gradient of all candidates, and that of its gradients.
        if edges is None or real.probe is not None or kwargs or len(args) != 1 or len(chain) > 1:
            return otherwise(layer, *args, **kwargs)
        if not plain_eager() or not edges.takes(args[0]):
            return otherwise(layer, *args, **kwargs)
        bias: Any = layer.bias
        return edges.compute(args[0], real.values_at(edges.index), bias)

    return forward
