"""I = A z with A in CSR, as a registered operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dnw_graph.errors import InputError
from dnw_graph.ops.call import run
from dnw_graph.ops.operands import (
    check_csr,
    check_memory,
    check_pointers,
    check_sources,
    check_tensors,
    check_types,
    is_half,
)

MAX_MESSAGES = 2**24  # Largest number of products computed at once without a kernel.


def sparse_product(
    z: Float[Tensor, "sources features"],
    rowptr: Int[Tensor, " rows"],
    columns: Int[Tensor, " edges"],
    values: Float[Tensor, " edges"],
) -> Float[Tensor, "targets features"]:
    r"""Return :math:`I = A z`, the weighted sum over the edges, for a sparse A of shape (targets × sources) in CSR.

    The operator ``dnw_graph::sparse_product`` of ordinary tensors. ``z`` and ``values`` get gradients, which can be
    differentiated again. Half precisions are summed in float32.

    Args:
        z: States, node-major; for images ``features = batch · height · width``.
        rowptr: Where the edges of each target start, and one past the last edge: ``[targets + 1]``, ascending from 0.
        columns: Source of each edge, int32 or int64 like ``rowptr``; in any order within a target, repeated or not.
        values: Weight of each edge.

    Raises:
        InputError: If shapes, dtypes or devices do not fit, or an index is out of range.

    Examples:
        >>> import torch
        >>> from dnw_graph.ops import sparse_product
        >>> z = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> sparse_product(z, torch.tensor([0, 2, 2]), torch.tensor([0, 1]), torch.tensor([10.0, 1.0]))
        tensor([[13., 24.],
                [ 0.,  0.]])
    """
    check_tensors(z=z, rowptr=rowptr, columns=columns, values=values)
    return _sparse_product(z, rowptr, columns, values)


@torch.library.custom_op(
    "dnw_graph::sparse_product",
    mutates_args=(),
    schema="(Tensor z, Tensor rowptr, Tensor columns, Tensor values) -> Tensor",
)
def _sparse_product(z: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    _check(z, rowptr, columns, values)
    return product(z, rowptr, columns, values)


@_sparse_product.register_fake
def _(z: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    _check(z, rowptr, columns, values)
    return z.new_empty(rowptr.size(0) - 1, z.size(1))


@torch.library.custom_op(
    "dnw_graph::sampled_product",
    mutates_args=(),
    schema="(Tensor received, Tensor z, Tensor rowptr, Tensor columns) -> Tensor",
)
def _sampled_product(received: Tensor, z: Tensor, rowptr: Tensor, columns: Tensor) -> Tensor:
    """⟨received_v, z_u⟩ for every edge (u, v): the gradient of the edges' weights."""
    _check_sampled(received, z, rowptr, columns)
    if is_half(z):
        return _sampled_product(received.float(), z.float(), rowptr, columns).to(z.dtype)
    received, z, rowptr, columns = received.contiguous(), z.contiguous(), rowptr.contiguous(), columns.contiguous()
    return sampled([z], rowptr, columns, received)


@_sampled_product.register_fake
def _(received: Tensor, z: Tensor, rowptr: Tensor, columns: Tensor) -> Tensor:
    _check_sampled(received, z, rowptr, columns)
    return z.new_empty(columns.size(0))


def product(z: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Compute A z, whose shapes and types have been checked."""
    if is_half(z):
        return product(z.float(), rowptr, columns, values.float()).to(z.dtype)
    return product_of_pieces([z.contiguous()], rowptr.contiguous(), columns.contiguous(), values.contiguous())


def product_of_pieces(pieces: Sequence[Tensor], rowptr: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Compute A z for contiguous tensors; z comes in pieces, each ``[sources, features]``."""
    z = pieces[0]
    if z.device.type == "cpu":
        out = z.new_empty(len(rowptr) - 1, z.size(1))
        numbers = (*out.shape, len(columns), [len(piece) for piece in pieces])
        if run("sparse_product", numbers, pieces, rowptr, columns, values, out):
            return out
    z = _checked(pieces, rowptr, columns)
    csr = torch.sparse_csr_tensor(rowptr, columns, values, (len(rowptr) - 1, len(z)), check_invariants=False)
    return torch.sparse.mm(csr, z, "sum") if z.device.type == "cpu" else csr @ z


def sampled(pieces: Sequence[Tensor], rowptr: Tensor, columns: Tensor, received: Tensor) -> Tensor:
    """Compute ⟨received_v, z_u⟩ for every edge, for contiguous tensors; z comes in pieces."""
    z = pieces[0]
    if z.device.type == "cpu":
        out = z.new_empty(len(columns))
        numbers = (*received.shape, len(columns), [len(piece) for piece in pieces])
        if run("sampled_product", numbers, pieces, rowptr, columns, received, out):
            return out
    z = _checked(pieces, rowptr, columns)
    step = max(1, MAX_MESSAGES // max(1, z.size(1)))
    parts = zip(targets_of(rowptr, columns).split(step), columns.split(step), strict=True)
    return torch.cat([(received[v] * z[u]).sum(1) for v, u in parts])


def sampled_matrix(received: Tensor, z: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
    """Return a matrix (targets × sources) of ⟨received_v, z_u⟩ for edges sorted by target, and zero elsewhere."""
    rowptr = torch.searchsorted(targets, torch.arange(len(received) + 1, device=targets.device))
    matrix = z.new_zeros(len(received), len(z))
    matrix[targets, sources] = sampled([z], rowptr, sources, received)
    return matrix


def by_source(rowptr: Tensor, columns: Tensor, sources: int) -> tuple[Tensor, Tensor]:
    """Return the row pointers of Aᵀ, and the permutation of the edges of A into its order."""
    if columns.device.type == "cpu":
        starts, order = columns.new_empty(sources + 1), columns.new_empty(len(columns))
        if run("by_source", (len(rowptr) - 1, sources, len(columns)), rowptr, columns, starts, order):
            return starts, order
    return _by_source(columns, sources)


def _checked(pieces: Sequence[Tensor], rowptr: Tensor, columns: Tensor) -> Tensor:
    """Return the states as one tensor, after checking the edges."""
    z = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
    check_pointers(rowptr, columns)
    check_sources(columns, 0, len(z))
    return z


def _check(z: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor) -> None:
    if z.dim() != 2:
        raise InputError(f"expected states of shape [sources, features]; got {list(z.shape)}: flatten the maps")
    check_csr(rowptr, columns, values)
    check_types((z, values), (rowptr, columns))
    check_memory(z.shape, (rowptr.size(0) - 1, z.size(1)))


def _check_sampled(received: Tensor, z: Tensor, rowptr: Tensor, columns: Tensor) -> None:
    check_csr(rowptr, columns, columns)
    check_types((received, z), (rowptr, columns))
    if z.dim() != 2 or received.shape != (rowptr.size(0) - 1, z.size(1)):
        shapes = f"{list(received.shape)} and {list(z.shape)}"
        raise InputError(f"expected received [targets, features] and z [sources, features]; got {shapes}")
    check_memory(z.shape, received.shape)


def targets_of(rowptr: Tensor, columns: Tensor) -> Tensor:
    """Return the target of every edge."""
    rows = torch.arange(rowptr.size(0) - 1, device=rowptr.device, dtype=rowptr.dtype)
    return torch.repeat_interleave(rows, rowptr.diff(), output_size=columns.size(0))


def _by_source(columns: Tensor, sources: int) -> tuple[Tensor, Tensor]:
    order = columns.argsort(stable=True)
    bounds = torch.arange(sources + 1, device=columns.device, dtype=columns.dtype)
    return torch.searchsorted(columns[order], bounds, out_int32=columns.dtype == torch.int32), order


def _transposed(rowptr: Tensor, columns: Tensor, values: Tensor, sources: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the CSR tensors of Aᵀ."""
    starts, order = _by_source(columns, sources)
    return starts, targets_of(rowptr, columns)[order], values[order]


def _save_product(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    z, rowptr, columns, values = ctx.saved_tensors
    z_grad = values_grad = None
    if ctx.needs_input_grad[0]:
        z_grad = _sparse_product(grad, *_transposed(rowptr, columns, values, z.size(0)))
    if ctx.needs_input_grad[3]:
        values_grad = _sampled_product(grad, z, rowptr, columns)
    return z_grad, None, None, values_grad


def _sampled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    received, z, rowptr, columns = ctx.saved_tensors
    received_grad = z_grad = None
    if ctx.needs_input_grad[0]:
        received_grad = _sparse_product(z, rowptr, columns, grad)
    if ctx.needs_input_grad[1]:
        z_grad = _sparse_product(received, *_transposed(rowptr, columns, grad, z.size(0)))
    return received_grad, z_grad, None, None


_sparse_product.register_autograd(_product_backward, setup_context=_save_product)
_sampled_product.register_autograd(_sampled_backward, setup_context=_save_product)
# Under autocast always in float32, like loss functions.
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("dnw_graph::sparse_product", _device, torch.float32)
