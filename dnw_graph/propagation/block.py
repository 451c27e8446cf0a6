"""Block-batched propagation: one dense product per block of candidates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnw_graph.propagation.base import Propagate, Propagation, RealEdges


class BlockPropagation(Propagation):
    """Dense products block by block: I = W Z, where W holds the real edges' weights and zeros elsewhere.

    The gradient of a dense product with respect to W is ⟨Z_u, ∂L/∂I_v⟩ for every pair of the block, hallucinated ones
    included, and the gradient with respect to Z goes through the non-zero entries only. So the method needs no more
    than a W whose backward hands that gradient to the candidates unmasked.

    Nodes are moved to the last dimension for the product, which costs nothing for channels-last maps.
    """

    def forward(self, edges: RealEdges) -> Propagate:
        """Scatter the real weights into dense blocks."""
        weights = edges.split(_RealWeights.apply(edges.candidates.weight, edges))

        def product(number: int, z: Tensor, rows: slice, columns: slice) -> Tensor:
            return F.linear(z.movedim(1, -1), weights[number][rows, columns]).movedim(-1, 1)

        return Propagate(edges.candidates.blocks, weights, product)


class _RealWeights(torch.autograd.Function):
    """All candidate weights with the hallucinated ones set to zero; the gradient passes to every candidate."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, edges: RealEdges) -> Tensor:
        ctx.edges = edges
        if edges.complete:
            return weight.view_as(weight)
        return torch.zeros_like(weight).index_copy_(0, edges.index, weight[edges.index])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.edges.restrict(grads[0]), None
