"""The real weights of one layer as edges, and the rule for when a layer computes over them alone."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dnw_graph._compat import convolves_as_pytorch
from dnw_graph.ops import sparse_conv2d
from dnw_graph.ops.build import kernels
from dnw_graph.ops.layer import Turned, trained_linear, turned
from dnw_graph.ops.layout import DTYPES, kernels_take
from dnw_graph.sparse_layers.layers import LayerWeight
from dnw_graph.usual import keeps_methods

DENSEST: dict[type[nn.Module], float] = {nn.Linear: 0.1, nn.Conv2d: 0.3}
"""Largest share of real weights with which a layer computes over them alone: near or below the share at which dense and
sparse layers take equally long to train, see ``benchmarks/sparse_training.py``."""
SMALLEST = 4096
"""A layer with fewer weights, hallucinated ones included, uses a dense weight: there is nothing to gain."""


def suits(layer: nn.Module) -> bool:
    """Return whether there are kernels for a layer.

    There are for ``nn.Linear``, for ``nn.Conv2d`` with zero padding given as numbers, and for subclasses that do not
    override their forward pass; not where it was replaced on the object.
    """
    kind = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    return keeps_methods(layer) and type(layer).forward is kind.forward and _pads_with_zeros(layer)


def _pads_with_zeros(layer: nn.Module) -> bool:
    """Return whether a layer is linear, or a convolution with zero padding given as numbers."""
    if not isinstance(layer, nn.Conv2d):
        return True
    return convolves_as_pytorch(layer) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def pays(weight: LayerWeight, num_real: int) -> bool:
    """Return whether a layer computes over its real weights alone.

    It does on a CPU with compiled kernels, in float32 and float64, if it has 4,096 weights or more, of which at most
    10% (linear layer) or 30% (convolution) are real.

    Args:
        weight: The weight.
        num_real: Number of its real candidates.
    """
    densest = DENSEST[nn.Linear if isinstance(weight.layer, nn.Linear) else nn.Conv2d]
    return (
        weight.numel >= SMALLEST
        and num_real <= densest * weight.numel
        and weight.parameter.device.type == "cpu"
        and weight.parameter.dtype in DTYPES
        and kernels() is not None
    )


class LayerEdges:
    """The real weights of a linear layer or 2-dimensional convolution, in CSR.

    Args:
        weight: The weight.
        index: Flat indices of its real candidates, ascending.
    """

    def __init__(self, weight: LayerWeight, index: Int[Tensor, " edges"]) -> None:
        outputs = weight.shape[0]
        sources = weight.numel // outputs
        self.weight, self.index = weight, index
        rows = torch.div(index, sources, rounding_mode="floor")
        self.columns = (index - rows * sources).int()
        self.rowptr = torch.searchsorted(rows, torch.arange(outputs + 1, device=index.device)).int()

    @cached_property
    @torch.inference_mode(False)
    def mask(self) -> Float[Tensor, "rows ..."]:
        """1 for real weights and 0 for hallucinated ones; computed when the layer's weight is read."""
        return self.weight.mask(self.index, self.weight.parameter)

    @cached_property
    @torch.inference_mode(False)
    def turned(self) -> Turned:
        """The edges of a linear layer by input; made once for all backward passes over them."""
        return turned(self.rowptr, self.columns, self.weight.shape[1])

    def takes(self, x: Tensor) -> bool:
        """Return whether the sparse operation supports such inputs, and the layer as it is now."""
        parameter, layer = self.weight.parameter, self.weight.layer
        if not kernels_take(x) or x.dtype != parameter.dtype or torch.is_autocast_enabled("cpu"):
            return False
        if isinstance(layer, nn.Linear):
            return x.dim() > 0 and x.size(-1) == layer.in_features
        return x.dim() == 4 and x.size(1) == self.weight.channels[0] and _pads_with_zeros(layer)

    def compute(self, x: Tensor, values: Float[Tensor, " edges"], bias: Tensor | None) -> Tensor:
        """Return the layer's outputs, with gradients of x and values over the edges alone.

        Args:
            x: The inputs.
            values: The values of the real weights.
            bias: The layer's bias.
        """
        layer = self.weight.layer
        if isinstance(layer, nn.Linear):
            return trained_linear(x, self.rowptr, self.columns, values, bias, lambda: self.turned)
        assert isinstance(layer, nn.Conv2d)
        window: Any = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return sparse_conv2d(x, self.rowptr, self.columns, values, bias, kernel=layer.kernel_size, **window)
