"""Sparse linear layers and convolutions, and the rule for when they are faster than dense ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dnw_graph.ops.flops  # noqa: F401
from dnw_graph.compaction.plain_layers import Conv, Layer, Linear, require, require_whole, scaled, shifted
from dnw_graph.compaction.products import check_csr
from dnw_graph.ops import sparse_conv2d, sparse_linear
from dnw_graph.ops.layer import LARGEST, LinearCall, dense_weight, plain_call, sides_after

DENSEST = 0.3
"""Largest share of non-zero weights for a sparse layer: below the smallest share at which dense and sparse layers take
equally long, see ``benchmarks/sparse_layers.py``."""
SMALLEST = 4096
"""A layer with fewer weights, zeros included, stays dense: there is nothing to gain."""


class SparseLayer(Layer):
    """Base of sparse linear layers and convolutions: a matrix in CSR and a bias."""

    rowptr: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None
    relu: bool

    def __init__(
        self, rowptr: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, sources: int, relu: bool
    ) -> None:
        super().__init__()
        check_csr(rowptr, columns, values, sources)
        require(bias is None or len(bias) + 1 == len(rowptr), "a sparse layer's bias must have one value per output")
        require(isinstance(relu, bool), "relu is true or false")
        self.register(rowptr=rowptr, columns=columns, values=values, bias=bias)
        self.sources, self.relu = sources, relu

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """Scale the weights of every output and shift the bias."""
        if self.relu:
            return False
        self.values = scaled(self.values, scale.repeat_interleave(self.rowptr.diff()))
        self.bias = shifted(self, scale, shift)
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return len(self.rowptr) - 1, self.sources

    @property
    def weight(self) -> Float[Tensor, "outputs ..."]:
        """The dense weight, for modules that read the weights of their layers, as attention and transformers do."""
        return dense_weight(self.rowptr, self.columns, self.values, self.sources).view(self.shape)


class SparseLinear(SparseLayer):
    """A linear layer over some of its weights, :func:`dnw_graph.ops.sparse_linear`. Arguments as of the operator.

    Args:
        rowptr: Where the weights of each output start.
        columns: Input of each weight.
        values: The weights.
        bias: One value per output, or None.
        inputs: Number of inputs.
        relu: Whether a ReLU follows.
    """

    options = ("inputs", "relu")
    on_last = True

    def __init__(
        self, rowptr: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, inputs: int, relu: bool = False
    ) -> None:
        require_whole(inputs, 1, "inputs")
        super().__init__(rowptr, columns, values, bias, inputs, relu)
        self.inputs = inputs
        self._call: LinearCall | None = None

    def forward(self, z: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Multiply and add the bias."""
        tensors = [self._buffers[name] for name in ("rowptr", "columns", "values", "bias")]
        if isinstance(z, Tensor) and plain_call(z, *tensors):
            if self._call is None or not self._call.fits(tensors):
                self._call = LinearCall(tensors, self.inputs, self.relu)
            out = self._call(z)
            if out is not None:
                return out
        return sparse_linear(z, self.rowptr, self.columns, self.values, self.bias, self.relu)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the call, which belongs to this process."""
        return {**self.__dict__, "_call": None}


class SparseConv(SparseLayer):
    """A convolution over some of its weights, :func:`dnw_graph.ops.sparse_conv2d`. Arguments as of the operator.

    Args:
        rowptr: Where the weights of each output channel start.
        columns: Index of each weight in the flattened kernel of its output channel.
        values: The weights.
        bias: One value per output channel, or None.
        inputs: Number of input channels.
        kernel: Height and width of the kernel.
        stride: Two numbers.
        padding: Two numbers.
        dilation: Two numbers.
        groups: Number of groups.
        relu: Whether a ReLU follows.
    """

    options = ("inputs", "kernel", "stride", "padding", "dilation", "groups", "relu")

    def __init__(
        self,
        rowptr: Tensor,
        columns: Tensor,
        values: Tensor,
        bias: Tensor | None,
        inputs: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        relu: bool = False,
    ) -> None:
        require_whole([inputs, groups, *kernel, *stride, *dilation], 1, "inputs, groups, kernel, stride and dilation")
        require_whole(list(padding), 0, "padding")
        sides = (kernel, stride, padding, dilation)
        require(all(len(each) == 2 and max(each) <= LARGEST for each in sides), "a convolution needs two of each side")
        require(inputs % groups == 0 and (len(rowptr) - 1) % groups == 0, f"channels are not {groups} groups")
        super().__init__(rowptr, columns, values, bias, inputs // groups * math.prod(kernel), relu)
        self.inputs, self.groups = inputs, groups
        self.kernel, self.stride, self.padding, self.dilation = map(list, sides)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.num_outputs, self.inputs // self.groups, *self.kernel

    @property
    def num_inputs(self) -> int:
        """Number of channels taken."""
        return self.inputs

    @property
    def num_outputs(self) -> int:
        """Number of channels returned."""
        return len(self.rowptr) - 1

    def forward(
        self, z: Float[Tensor, "batch inputs height width"], add: Float[Tensor, "batch outputs h w"] | None = None
    ) -> Float[Tensor, "batch outputs h w"]:
        """Convolve, and add another tensor if there is one, which may be broadcast."""
        window = [*self.kernel, *self.stride, *self.padding, *self.dilation]
        if add is not None and tuple(add.shape) != (z.size(0), self.num_outputs, *sides_after(z, window)):
            out = self._convolved(z, None, False) + add
            return out.relu() if self.relu else out
        return self._convolved(z, add, self.relu)

    def _convolved(self, z: Tensor, add: Tensor | None, relu: bool) -> Tensor:
        return sparse_conv2d(
            z,
            self.rowptr,
            self.columns,
            self.values,
            self.bias,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            add=add,
            relu=relu,
        )


def pays(weight: Tensor) -> bool:
    """Return whether a layer with this weight becomes sparse: the rule of :func:`compact`."""
    return weight.numel() >= SMALLEST and int(weight.count_nonzero()) <= DENSEST * weight.numel()


def sparse_form(layer: Conv | Linear) -> SparseLayer | None:
    """Return a layer as a sparse layer, or None if it should stay dense."""
    if not pays(layer.weight):
        return None
    csr = _csr(layer.weight.flatten(1))
    form: SparseLayer
    if isinstance(layer, Linear):
        form = SparseLinear(*csr, layer.bias, layer.weight.size(1))
        form.label = layer.label
        return form
    kernel = list(layer.weight.shape[2:])
    reach = [dilation * (side - 1) for dilation, side in zip(layer.dilation, kernel, strict=True)]
    padding = [0, 0] if layer.padding == "valid" else [each // 2 for each in reach]
    if isinstance(layer.padding, list):
        padding = layer.padding
    elif layer.padding == "same" and any(each % 2 for each in reach):
        return None  # The padding differs between the two sides.
    if max(*kernel, *layer.stride, *padding, *layer.dilation) > LARGEST:
        return None
    window = (kernel, layer.stride, padding, layer.dilation)
    form = SparseConv(*csr, layer.bias, layer.num_inputs, *window, layer.groups)
    form.label = layer.label
    return form


def make_sparse(model: nn.Module) -> None:
    """Replace the layers within a compact model that are faster as sparse layers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            form = sparse_form(child) if isinstance(child, Conv | Linear) else None
            if form is not None:
                setattr(parent, name, form)


def _csr(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = matrix.nonzero(as_tuple=True)
    bounds = torch.arange(len(matrix) + 1, device=matrix.device)
    return torch.searchsorted(rows, bounds).int(), columns.int(), matrix[rows, columns]
