"""Propagation as PyG message passing: the reference formulation."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dnw_graph.arguments import checked, require
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.ops.csr import by_source, sampled_matrix
from dnw_graph.ops.layout import detach_view, transformed
from dnw_graph.ops.operands import first_order
from dnw_graph.propagation.gradient import unrestricted_weights
from dnw_graph.propagation.propagate import Propagate, Propagation, RealEdges, channels_last

if TYPE_CHECKING:
    from dnw_graph.propagation.weighted_sum import WeightedSum

ADJACENCIES = ("edge_index", "csr", "torch_sparse")
TILE = 2048


class MessagePassingPropagation(Propagation):
    """Propagation on an explicit sparse graph with PyG.

    Args:
        adjacency: How edges are passed to PyG. ``"edge_index"``: an edge list, one message per edge (``message`` and
            ``aggregate``). ``"csr"``: a sparse PyTorch matrix (``message_and_aggregate``). ``"torch_sparse"``: a
            ``torch_sparse.SparseTensor`` (``message_and_aggregate``); needs the extension packages.
        max_message_bytes: With ``"edge_index"``, the largest tensor of messages that may be built.

    Raises:
        InputError: If the adjacency is unknown or its package is not installed; in the forward pass, if messages would
            exceed ``max_message_bytes``, or if it is transformed by ``torch.func``.
    """

    @checked
    def __init__(self, adjacency: str = "edge_index", max_message_bytes: int = 2**31) -> None:
        super().__init__()
        if adjacency not in ADJACENCIES:
            raise unknown_name("adjacency", adjacency, ADJACENCIES)
        if adjacency == "torch_sparse" and importlib.util.find_spec("torch_sparse") is None:
            raise InputError(
                "adjacency 'torch_sparse' needs torch-sparse, which is not installed; "
                "use 'csr', or install the extra dnw-graph[pyg-ext]"
            )
        require(max_message_bytes >= 0, "max_message_bytes", "an integer >= 0", max_message_bytes)
        self.adjacency = adjacency
        self.max_message_bytes = max_message_bytes
        # PyG is imported only if message passing is used.
        from dnw_graph.propagation.weighted_sum import WeightedSum

        self.weighted_sum = WeightedSum()

    def forward(self, edges: RealEdges, x: Tensor) -> Propagate:
        """Split the ascending flat indices into edge lists by block."""
        if transformed():
            raise InputError(
                "propagation='message_passing' cannot be transformed by torch.func; use propagation='auto'"
            )
        return _Messages(self, edges)

    def send(
        self,
        z: Float[Tensor, "sources features"],
        targets: Int[Tensor, " edges"],
        sources: Int[Tensor, " edges"],
        values: Float[Tensor, " edges"],
        num_targets: int,
    ) -> Float[Tensor, "targets features"]:
        """Return the inputs of targets over edges sorted by target."""
        # Without edges the product with a SparseTensor is a constant, through which no gradient flows.
        if self.adjacency == "edge_index" or not len(values):
            size = len(values) * z.size(1) * z.element_size()
            if size > self.max_message_bytes:
                raise InputError(
                    f"{len(values)} messages of {z.size(1)} values each would take {size / 2**30:.1f} GiB, more than "
                    f"max_message_bytes = {self.max_message_bytes / 2**30:.1f} GiB; use propagation='block' or "
                    "MessagePassingPropagation(adjacency='csr')"
                )
            return self.weighted_sum(z, torch.stack([sources, targets]), values, num_targets)
        # Flat indices are ordered by target, as CSR is.
        rowptr = torch.searchsorted(targets, torch.arange(num_targets + 1, device=targets.device))
        if self.adjacency == "csr":
            return _SparseProduct.apply(self.weighted_sum, z, rowptr, targets, sources, values)
        from torch_sparse import SparseTensor

        adj_t = SparseTensor(
            rowptr=rowptr,
            col=sources,
            value=values,
            sparse_sizes=(num_targets, z.size(0)),
            is_sorted=True,
            trust_data=True,
        )
        return self.weighted_sum(z, adj_t)

    def extra_repr(self) -> str:
        """Options, for ``repr``."""
        return f"adjacency={self.adjacency!r}"


class _Messages(Propagate):
    """Messages over the edges of a block."""

    def __init__(self, propagation: MessagePassingPropagation, edges: RealEdges) -> None:
        super().__init__(edges, edges.split(unrestricted_weights(edges)))
        self.propagation = propagation

    def product(self, number: int, z: Tensor, rows: slice, columns: slice) -> Tensor:
        targets, sources = self.blocks[number].within(self.edges.local[number], rows, columns)
        weight = self.weights[number][rows, columns]
        # Detached: the candidates get their gradient from _CandidateGradient.
        values = weight.detach()[targets, sources].to(z.dtype)
        features = z.transpose(0, 1).flatten(1)
        received = self.propagation.send(features, targets, sources, values, weight.size(0))
        # [targets, batch · space] back to [batch, targets, *space]
        received = received.view(weight.size(0), z.size(0), *z.shape[2:]).transpose(0, 1)
        sampled = None
        if self.edges.sampled is not None:
            sampled = self.blocks[number].within(self.edges.local_sampled[number], rows, columns)
        return _CandidateGradient.apply(channels_last(received), z.detach(), weight, sampled)


class _CandidateGradient(torch.autograd.Function):
    """The identity on I; the backward pass computes the gradient of every candidate of the block, or of some."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, z: Tensor, weight: Tensor, sampled: tuple[Tensor, Tensor] | None) -> Tensor:
        ctx.sampled = sampled
        ctx.save_for_backward(z)
        return detach_view(received)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        (z,) = ctx.saved_tensors
        weight_grad = None
        if ctx.needs_input_grad[2] and ctx.sampled is None:
            # Nodes last: no copy for channels-last maps.
            weight_grad = grads[0].movedim(1, -1).flatten(0, -2).t() @ z.movedim(1, -1).flatten(0, -2)
        elif ctx.needs_input_grad[2]:
            received_grad, states = (each.transpose(0, 1).flatten(1).contiguous() for each in (grads[0], z))
            weight_grad = sampled_matrix(received_grad, states, *ctx.sampled)
        return grads[0], None, weight_grad, None


class _SparseProduct(torch.autograd.Function):
    """Message passing over a CSR adjacency; the gradient of the states is the product with its transpose."""

    @staticmethod
    def forward(
        ctx: Any,
        weighted_sum: WeightedSum,
        z: Tensor,
        rowptr: Tensor,
        targets: Tensor,
        sources: Tensor,
        values: Tensor,
    ) -> Tensor:
        ctx.weighted_sum = weighted_sum
        ctx.num_sources = z.size(0)
        ctx.save_for_backward(rowptr, targets, sources, values)
        return _in_tiles(weighted_sum, z, _csr(rowptr, sources, values, z.size(0)))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rowptr, targets, sources, values = ctx.saved_tensors
        starts, order = by_source(rowptr, sources, ctx.num_sources)
        transposed = _csr(starts, targets[order], values[order], grads[0].size(0))
        return None, _in_tiles(ctx.weighted_sum, grads[0].contiguous(), transposed), None, None, None, None


def _in_tiles(weighted_sum: WeightedSum, z: Tensor, adjacency: Tensor) -> Tensor:
    """Send the states some columns at a time, on a CPU, so that the rows of one tile stay in its cache."""
    if z.device.type != "cpu" or z.size(1) <= 2 * TILE:
        return weighted_sum(z, adjacency)
    return torch.cat([weighted_sum(tile.contiguous(), adjacency) for tile in z.split(TILE, dim=1)], dim=1)


def _csr(rowptr: Tensor, columns: Tensor, values: Tensor, num_columns: int) -> Tensor:
    _let_pytorch_warn()
    size = (rowptr.numel() - 1, num_columns)
    return torch.sparse_csr_tensor(rowptr, columns, values, size, check_invariants=False)


@functools.cache
def _let_pytorch_warn() -> None:
    """Create a first CSR matrix and hide PyTorch's warning, shown once, that CSR support is in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)
