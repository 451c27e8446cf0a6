"""The interface of propagation, the product Z → I over the real edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dnw_graph.candidates import Block, CandidateEdges

Propagate = Callable[[int, Tensor], Tensor]
"""``propagate(number, z)``: from the states of the sources of candidate block ``number``, ``[batch, sources, *space]``,
to what its targets receive, ``[batch, targets, *space]``."""


@dataclass(frozen=True)
class RealEdges:
    """The real edges of one forward pass.

    Attributes:
        candidates: The graph's candidates, whose ``weight`` gets the gradient.
        index: Flat indices of the real edges, ascending: ``[k]``.
        updates_hallucinated: Whether every candidate gets ⟨Z_u, ∂L/∂I_v⟩, or the real edges only.
    """

    candidates: CandidateEdges
    index: Int[Tensor, " edges"]
    updates_hallucinated: bool

    def restrict(self, gradient: Float[Tensor, " candidates"]) -> Float[Tensor, " candidates"]:
        """Keep the part of a gradient of all candidates that the wiring asks for."""
        if self.updates_hallucinated:
            return gradient
        return torch.zeros_like(gradient).index_copy_(0, self.index, gradient[self.index])

    def split(self, flat: Float[Tensor, " candidates"]) -> list[Float[Tensor, "targets sources"]]:
        """Split a flat vector into the blocks' matrices; its backward is one concatenation."""
        blocks: tuple[Block, ...] = self.candidates.blocks
        sizes = [block.flat.stop - block.flat.start for block in blocks]
        return [part.view(block.shape) for part, block in zip(flat.split(sizes), blocks, strict=True)]


class Propagation(nn.Module):
    """One way of computing I_v = Σ w_uv Z_u (Equation 2 of the paper) and its gradients.

    All ways give one result: states get their gradient through the real edges only, and the candidate weights get
    ⟨Z_u, ∂L/∂I_v⟩, all of them or the real ones as the wiring says.
    """

    def forward(self, edges: RealEdges) -> Propagate:
        """Prepare the real edges once and return the function that a dynamics calls for each block."""
        raise NotImplementedError
