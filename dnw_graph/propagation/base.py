"""The interface of propagation, the product Z → I over the real edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dnw_graph.candidates import Block, CandidateEdges


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

    @property
    def complete(self) -> bool:
        """Whether all candidates are real."""
        return self.index.numel() == self.candidates.num_candidates

    def restrict(self, gradient: Float[Tensor, " candidates"]) -> Float[Tensor, " candidates"]:
        """Keep the part of a gradient of all candidates that the wiring asks for."""
        if self.updates_hallucinated or self.complete:
            return gradient
        return torch.zeros_like(gradient).index_copy_(0, self.index, gradient[self.index])

    def split(self, flat: Float[Tensor, " candidates"]) -> list[Tensor]:
        """Split a flat vector into the blocks' matrices ``[targets, sources]``; its backward is one concatenation."""
        blocks: tuple[Block, ...] = self.candidates.blocks
        sizes = [block.flat.stop - block.flat.start for block in blocks]
        return [part.view(block.shape) for part, block in zip(flat.split(sizes), blocks, strict=True)]


@dataclass(frozen=True)
class Propagate:
    """The product Z → I over the real edges of one forward pass, block by block.

    Attributes:
        blocks: The blocks of candidates.
        weights: Their matrices, each ``[targets, sources]``. Every gradient of a candidate passes through them, so that
            a solver that differentiates by hand knows what to differentiate.
        product: ``product(number, z, rows, columns)``: from the states of the sources in ``columns`` of a block to what
            its targets in ``rows`` receive over its real edges.
    """

    blocks: tuple[Block, ...]
    weights: list[Tensor]
    product: Callable[[int, Tensor, slice, slice], Tensor]

    def __call__(
        self,
        number: int,
        z: Float[Tensor, "batch sources *space"],
        sources: range | None = None,
        targets: range | None = None,
    ) -> Float[Tensor, "batch targets *space"]:
        """Return what the targets of a block receive.

        Args:
            number: Number of the block.
            z: States of the sources.
            sources: The sources that z holds, if not all of the block; those left out must have the state zero.
            targets: The targets asked for, if not all of the block.
        """
        block = self.blocks[number]
        return self.product(number, z, _within(targets, block.targets), _within(sources, block.sources))


def _within(part: range | None, whole: range) -> slice:
    part = whole if part is None else part
    return slice(part.start - whole.start, part.stop - whole.start)


class Propagation(nn.Module):
    """One way of computing I_v = Σ w_uv Z_u (Equation 2 of the paper) and its gradients.

    All ways give one result: states get their gradient through the real edges only, and the candidate weights get
    ⟨Z_u, ∂L/∂I_v⟩, all of them or the real ones as the wiring says.
    """

    def forward(self, edges: RealEdges) -> Propagate:
        """Prepare the real edges once and return the function that a dynamics calls for each block."""
        raise NotImplementedError
