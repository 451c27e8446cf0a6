"""Block-batched propagation: one dense product per block of candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnw_graph.candidates import Block
from dnw_graph.ops.layout import detach_view, plain_eager, traced, transformed
from dnw_graph.ops.operands import batched
from dnw_graph.propagation.gradient import real_weights, transformable
from dnw_graph.propagation.message_passing import MessagePassingPropagation
from dnw_graph.propagation.propagate import Propagate, Propagation, RealEdges, States, autocast_dtype


class BlockPropagation(Propagation):
    """Dense products block by block: I = W Z, where W holds the real edges' weights and zeros elsewhere.

    Both gradients of a dense product are those of :mod:`dnw_graph.propagation.gradient`, as long as the backward pass
    of W passes its gradient to the candidates unmasked.

    A NaN or infinite input or initial state of the graph spreads along real edges only, as in every propagation. The
    zeros of W would spread it further (0 · ∞ is NaN), so such a pass goes over the edges one by one. There is no such
    check on a GPU (the host would have to synchronise), in compiled or transformed code, and for states that overflow
    within the graph: there, all targets of such a source become NaN.

    Nodes are moved to the last dimension for the product, which costs nothing for channels-last maps. The states of a
    static graph share one buffer; each product reads the columns that it needs. The same holds for their gradients.
    """

    def forward(self, edges: RealEdges, x: Tensor) -> Propagate:
        """Scatter the real weights into dense blocks."""
        return _Dense(edges, edges.split(transformable(edges) if transformed() else real_weights(edges))).suited(x)


class _Dense(Propagate):
    """Products with the blocks' matrices."""

    def product(self, number: int, z: Tensor, rows: slice, columns: slice) -> Tensor:
        return F.linear(z.movedim(1, -1), self.weights[number][rows, columns]).movedim(-1, 1)

    def suited(self, z: Tensor) -> Propagate:
        if z.is_cpu and plain_eager() and not _finite(z):
            return MessagePassingPropagation("csr")(self.edges, z)
        return self

    def start(self, feeding: Sequence[slice]) -> States:
        # If a single block feeds each, nothing needs concatenation; a compiler plans its own buffers, and a transform
        # cannot track writes to a shared one.
        if traced() or all(part.stop - part.start == 1 for part in feeding):
            return super().start(feeding)
        return _States(self.blocks, self.weights)


def _finite(x: Tensor) -> bool:
    """Return whether all values are finite; in one pass, unless their sum is not finite."""
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())


class _States(States):
    """The states of a static graph in one buffer ``[batch, *space, sources]``, whose columns are filled block by block.

    The filled part is the concatenation of all states so far, see :class:`_Receive`.
    """

    def __init__(self, blocks: Sequence[Block], weights: Sequence[Tensor]) -> None:
        self.blocks, self.weights = blocks, weights
        self.buffer: Tensor | None = None
        self.filled: Tensor | None = None

    def receive(self, number: int, z: Tensor) -> Tensor:
        """Write the states into their columns and return the product of those that feed the next block."""
        if self.buffer is None:
            dtype = autocast_dtype(z)
            if dtype is not None:
                self.weights = [weight.to(dtype) for weight in self.weights]
            num_sources = self.blocks[-1].targets.start
            # Not empty: products on AMX multiply columns beside their own by zero, and NaN stays NaN.
            self.buffer = z.new_zeros(z.size(0), *z.shape[2:], num_sources, dtype=dtype or z.dtype)
        block = self.blocks[number]
        start = 0 if self.filled is None else self.filled.size(-1)
        columns = slice(block.sources.start, block.sources.stop)
        received, self.filled = _Receive.apply(self.filled, z, self.weights[number], self.buffer, start, columns)
        return received


class _Receive(torch.autograd.Function):
    """``filled ← [filled, z]``, ``received = filled[columns] Wᵀ``, without copying the filled part.

    The gradient of ``filled`` is passed from product to product in one buffer, to which each adds its own: when the
    gradient of z is read from it, all blocks that z feeds have added theirs.
    """

    @staticmethod
    def forward(
        ctx: Any, filled: Tensor | None, z: Tensor, weight: Tensor, buffer: Tensor, start: int, columns: slice
    ) -> tuple[Tensor, Tensor]:
        ctx.start, ctx.columns = start, columns
        ctx.set_materialize_grads(False)
        stop = start + z.size(1)
        buffer[..., start:stop].copy_(z.movedim(1, -1))
        # An alias with its own version: its content does not change while further columns are filled.
        filled = buffer[..., :stop].data
        ctx.save_for_backward(filled, weight)
        return detach_view((filled[..., columns] @ weight.t()).movedim(-1, 1)), filled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        received_grad, filled_grad = grads
        filled, weight = ctx.saved_tensors
        to_filled, to_z, to_weight = ctx.needs_input_grad[:3]
        weight_grad = None
        if received_grad is not None:
            # One copy, if any, for both products.
            received_grad = received_grad.movedim(1, -1).reshape(-1, len(weight))
            if to_weight:
                weight_grad = received_grad.t() @ filled[..., ctx.columns].flatten(0, -2)
            if to_filled or to_z:
                filled_grad = _add_product(filled_grad, received_grad, weight, ctx.columns, filled.shape)
        if filled_grad is None:
            return None, None, weight_grad, None, None, None
        before, z_grad = filled_grad.tensor_split([ctx.start], -1)
        return before if to_filled else None, z_grad.movedim(-1, 1), weight_grad, None, None, None


def _add_product(total: Tensor | None, grad: Tensor, weight: Tensor, columns: slice, shape: Sequence[int]) -> Tensor:
    """Return ``total``, or zeros if it is None, of a shape, with ``grad W`` added to some of its columns."""
    if total is not None and not torch.is_grad_enabled() and not batched(grad):
        # In place: a gradient of ``filled`` is created here, or by products with ``filled``, and not used elsewhere.
        part = total.view(-1, shape[-1])[:, columns]
        torch.addmm(part, grad, weight, out=part)
        return total
    product = (grad @ weight).view(*shape[:-1], weight.size(1))
    if columns != slice(0, shape[-1]):
        product = F.pad(product, (columns.start, shape[-1] - columns.stop))
    return product if total is None else total + product
