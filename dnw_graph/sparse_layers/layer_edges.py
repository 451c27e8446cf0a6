"""The real weights of one layer as edges, and the rule for when a layer computes over them alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from dnw_graph._compat import convolves_as_pytorch
from dnw_graph.ops import sparse_conv2d
from dnw_graph.ops.build import kernels
from dnw_graph.ops.layer import Turned, trained_linear, turned
from dnw_graph.ops.layout import DTYPES, kernels_take
from dnw_graph.propagation.gradient import with_dense_gradient
from dnw_graph.sparse_layers.layers import LayerWeight

DENSEST: dict[type[nn.Module], float] = {nn.Linear: 0.1, nn.Conv2d: 0.3}
"""Largest share of real weights with which a layer computes over them alone: near or below the share at which dense and
sparse layers take equally long to train, see ``benchmarks/sparse_training.py``."""
SMALLEST = 4096
"""A layer with fewer weights, hallucinated ones included, uses a dense weight: there is nothing to gain."""


def suits(layer: nn.Module) -> bool:
    """Return whether there are kernels for a layer.

    There are for ``nn.Linear``, for ``nn.Conv2d`` with zero padding given as numbers, and for subclasses that do not
    override their forward pass.
    """
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    if not isinstance(layer, nn.Conv2d) or not convolves_as_pytorch(layer):
        return False
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


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
        """Return whether the sparse operation supports such inputs."""
        parameter, layer = self.weight.parameter, self.weight.layer
        if not kernels_take(x) or x.dtype != parameter.dtype or torch.is_autocast_enabled("cpu"):
            return False
        if isinstance(layer, nn.Linear):
            return x.dim() > 0 and x.size(-1) == layer.in_features
        return x.dim() == 4 and x.size(1) == self.weight.channels[0]

    def compute(self, x: Tensor, values: Float[Tensor, " edges"], bias: Tensor | None, probe: Tensor | None) -> Tensor:
        """Return the layer's outputs, with gradients of x and values over the edges alone.

        Args:
            x: The inputs.
            values: The values of the real weights.
            bias: The layer's bias.
            probe: Receives the gradient of all candidates, if given.
        """
        layer = self.weight.layer
        if isinstance(layer, nn.Linear):
            y = trained_linear(x, self.rowptr, self.columns, values, bias, lambda: self.turned)
            return y if probe is None else with_dense_gradient(y, x, probe, _linear_gradient)
        assert isinstance(layer, nn.Conv2d)
        window: Any = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        y = sparse_conv2d(x, self.rowptr, self.columns, values, bias, kernel=layer.kernel_size, **window)
        if probe is None:
            return y
        return with_dense_gradient(y, x, probe, partial(_convolution_gradient, shape=probe.shape, window=window))


def _linear_gradient(x: Tensor, grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.size(-1)).t() @ x.reshape(-1, x.size(-1))


def _convolution_gradient(x: Tensor, grad: Tensor, shape: torch.Size, window: Mapping[str, Any]) -> Tensor:
    return conv2d_weight(x, list(shape), grad, **window)
