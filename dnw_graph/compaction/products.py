"""The product Z → I of a compact graph: over an edge list, or with a matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import dnw_graph.ops.flops  # noqa: F401
from dnw_graph.compaction.plain_layers import Layer, require, require_whole, scaled, shifted
from dnw_graph.ops import sparse_product
from dnw_graph.ops.operands import INTEGERS


class SparseProduct(Layer):
    r"""The product :math:`I_v = b_v + \sum_{(u,v) \in E} w_{uv} Z_u` over the edges, in CSR.

    Args:
        rowptr: Start of the edges of each target, and one past the last edge: ``[targets + 1]``.
        columns: Source of every edge.
        values: Weight of every edge.
        bias: ``[targets]``, from a batch norm that was folded into the product.
        sources: Number of sources.
    """

    options = ("sources",)
    rowptr: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor

    def __init__(self, rowptr: Tensor, columns: Tensor, values: Tensor, bias: Tensor, sources: int) -> None:
        super().__init__()
        require_whole(sources, 0, "sources")
        require(len(rowptr) == len(bias) + 1, f"{len(bias)} targets need {len(bias) + 1} row pointers")
        check_csr(rowptr, columns, values, sources)
        self.register(rowptr=rowptr, columns=columns, values=values, bias=bias)
        self.sources = sources

    @property
    def num_inputs(self) -> int:
        """Number of sources."""
        return self.sources

    @property
    def num_outputs(self) -> int:
        """Number of targets."""
        return len(self.bias)

    @property
    def num_edges(self) -> int:
        """Number of edges."""
        return len(self.values)

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """Scale the weights of every target's edges, and shift the bias."""
        self.values = scaled(self.values, scale.repeat_interleave(self.rowptr.diff()))
        self.bias = shifted(self, scale, shift)
        return True

    def forward(self, z: Float[Tensor, "batch sources *space"]) -> Float[Tensor, "batch targets *space"]:
        """Return the inputs of the targets."""
        received = sparse_product(z.transpose(0, 1).flatten(1), self.rowptr, self.columns, self.values)
        received = received + self.bias.view(-1, 1)
        return received.view(len(self.bias), z.size(0), *z.shape[2:]).transpose(0, 1)


class DenseProduct(Layer):
    """The same product with a dense matrix, zero where there is no edge.

    The matrix is stored as the weight of a 1×1 convolution, ``[targets, sources, 1, 1]``, since other runtimes would
    treat a view of a matrix as a computed weight.

    If a source is NaN or infinite, all targets are NaN, since 0 · ∞ is NaN.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        is_matrix = weight.dim() == 2 or weight.shape[2:] == (1, 1)
        require(is_matrix and bias.shape == weight.shape[:1], "a product needs a matrix and a bias per row")
        self.register(weight=weight.view(*weight.shape[:2], 1, 1), bias=bias)

    @property
    def edge_mask(self) -> Tensor:
        """Where the matrix has edges, for ``cost``."""
        return self.weight != 0

    def own_parameters(self) -> int:
        """Return the number of its parameters, without zeros."""
        return int(self.edge_mask.sum()) + self.bias.numel()

    @property
    def num_inputs(self) -> int:
        """Number of sources."""
        return self.weight.size(1)

    @property
    def num_outputs(self) -> int:
        """Number of targets."""
        return self.weight.size(0)

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """Scale the rows of the matrix, and shift the bias."""
        self.weight, self.bias = scaled(self.weight, scale.view(-1, 1, 1, 1)), shifted(self, scale, shift)
        return True

    def forward(self, z: Float[Tensor, "batch sources *space"]) -> Float[Tensor, "batch targets *space"]:
        """Return the inputs of the targets."""
        if z.dim() == 4:
            return F.conv2d(z, self.weight, self.bias)
        return F.linear(z.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


Product = SparseProduct | DenseProduct


def check_csr(rowptr: Tensor, columns: Tensor, values: Tensor, sources: int) -> None:
    """Refuse tensors that are not a sparse matrix in CSR.

    Raises:
        InputError: If shapes or types do not fit, an index lies outside the matrix, or the sources of a target do not
            ascend.
    """
    require(
        rowptr.dim() == columns.dim() == 1 and columns.shape == values.shape,
        "edges need one source and one weight each",
    )
    require(rowptr.dtype == columns.dtype and columns.dtype in INTEGERS, "edges need integer indices")
    require(values.is_floating_point(), "edges need floating-point numbers as weights")
    require(
        int(rowptr[0]) == 0 and int(rowptr[-1]) == len(columns) and bool((rowptr.diff() >= 0).all()),
        f"row pointers must ascend from 0 to the number of edges, {len(columns)}",
    )
    if len(columns):
        low, high = int(columns.min()), int(columns.max())
        require(0 <= low <= high < sources, f"sources {low} … {high} of the edges lie outside 0 … {sources - 1}")
        target = torch.repeat_interleave(rowptr.diff())
        ascending = (target.diff() > 0) | (columns.diff() > 0)
        require(bool(ascending.all()), "the sources of each target must be distinct and ascend")
