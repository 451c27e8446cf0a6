"""The interface of propagation, the product Z → I over the real edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dnw_graph.candidates import Block, CandidateEdges
from dnw_graph.ops.layout import transformed

SAMPLED = 1 / 12
"""Largest share of the candidates whose gradients are computed edge by edge; above, a dense product is faster.

On a core with AVX-512 both take equally long at a share of 0.09 to 0.11.
"""


def channels_last(x: Tensor) -> Tensor:
    """Return maps with the nodes last in memory, which suits dense products and convolutions; other tensors as is."""
    # Within torch.func.vmap no memory format can be requested.
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and not transformed() else x


def autocast_dtype(z: Tensor) -> torch.dtype | None:
    """Return the dtype in which a linear layer computes under autocast, or None if it is that of the input."""
    kind = z.device.type
    if z.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


# Compared and hashed by identity: after a graph break the compiler hashes an object before it has fields.
@dataclass(frozen=True, eq=False)
class RealEdges:
    """The real edges of one forward pass.

    Attributes:
        candidates: The graph's candidates.
        index: Flat indices of the real edges, ascending: ``[k]``.
        weight: Value of each candidate if it is real, ``[num_candidates]``; receives the gradient.
        learning: Flat indices of the candidates that get a gradient; None for all, ``index`` for the real edges.
        probe: Collects the gradient of every candidate, if a rule requests it.
    """

    candidates: CandidateEdges
    index: Int[Tensor, " edges"]
    weight: Float[Tensor, " candidates"]
    learning: Int[Tensor, " learning"] | None = None
    probe: Float[Tensor, " candidates"] | None = None

    @cached_property
    def sampled(self) -> Int[Tensor, " learning"] | None:
        """Flat indices of the candidates whose gradients are computed edge by edge; None for a dense product."""
        few = self.learning is not None and self.learning.numel() <= SAMPLED * self.candidates.num_candidates
        return self.learning if few and self.probe is None else None

    @property
    def complete(self) -> bool:
        """Whether all candidates are real."""
        return self.index.numel() == self.candidates.num_candidates

    @property
    def num_learning(self) -> int:
        """Number of candidates whose gradient is requested."""
        some = self.learning is not None and self.probe is None
        return self.learning.numel() if some and self.learning is not None else self.candidates.num_candidates

    @cached_property
    def local(self) -> list[Int[Tensor, " part"]]:
        """The real edges of each block, counted from the block's first candidate."""
        return self._by_block(self.index)

    @cached_property
    def local_sampled(self) -> list[Int[Tensor, " part"]]:
        """The same for the candidates in ``sampled``."""
        assert self.sampled is not None
        return self.local if self.sampled is self.index else self._by_block(self.sampled)

    def _by_block(self, index: Tensor) -> list[Tensor]:
        blocks = self.candidates.blocks
        starts = torch.tensor([block.offset for block in blocks], device=index.device)
        parts = index.tensor_split(torch.searchsorted(index, starts[1:]).tolist())
        return [part - block.offset for part, block in zip(parts, blocks, strict=True)]

    def restrict(self, gradient: Float[Tensor, " candidates"]) -> Float[Tensor, " candidates"]:
        """Keep the part of a gradient of all candidates that the wiring requests."""
        if self.learning is None or self.learning.numel() == gradient.numel():
            return gradient
        return torch.zeros_like(gradient).index_copy_(0, self.learning, gradient[self.learning])

    def split(self, flat: Float[Tensor, " candidates"]) -> list[Tensor]:
        """Split a flat vector into the blocks' matrices ``[targets, sources]``; its backward is one concatenation."""
        blocks: tuple[Block, ...] = self.candidates.blocks
        sizes = [block.flat.stop - block.flat.start for block in blocks]
        return [part.view(block.shape) for part, block in zip(flat.split(sizes), blocks, strict=True)]


class Propagate:
    """The product Z → I over the real edges of one forward pass, block by block.

    Args:
        edges: The real edges.
        weights: The matrices of the blocks, each ``[targets, sources]``. Every gradient of a candidate passes through
            them, so that a solver with its own differentiation knows its parameters.

    Attributes:
        edges: The real edges.
        weights: The matrices.
        blocks: The blocks of candidates.
        first_order: Whether kernels compute it: in the dtype of the weights, under autocast too. Their gradients cannot
            be differentiated again.
    """

    first_order = False

    def __init__(self, edges: RealEdges, weights: list[Tensor]) -> None:
        self.edges, self.weights = edges, weights
        self.blocks: tuple[Block, ...] = edges.candidates.blocks

    def __call__(
        self,
        number: int,
        z: Float[Tensor, "batch sources *space"],
        sources: range | None = None,
        targets: range | None = None,
    ) -> Float[Tensor, "batch targets *space"]:
        """Return the inputs of a block's targets.

        Args:
            number: Number of the block.
            z: States of the sources.
            sources: The sources that z holds. Default: all of the block. All others must have the state zero.
            targets: The targets requested. Default: all of the block.
        """
        block = self.blocks[number]
        return self.product(number, z, _within(targets, block.targets), _within(sources, block.sources))

    def product(
        self, number: int, z: Float[Tensor, "batch sources *space"], rows: slice, columns: slice
    ) -> Float[Tensor, "batch targets *space"]:
        """Return the inputs of some targets of a block, over its real edges.

        Args:
            number: Number of the block.
            z: States of the sources in ``columns`` of its matrix.
            rows: Rows of the matrix: the targets.
            columns: Columns of the matrix.
        """
        raise NotImplementedError

    def arrange(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Convert the input of the graph to the memory layout that suits the product."""
        return channels_last(x)

    def suited(self, z: Float[Tensor, "batch ..."]) -> Propagate:
        """Return this product, or one that does not spread NaN and infinity in z beyond the real edges."""
        return self

    def start(self, feeding: Sequence[slice]) -> States:
        """Return the states of a static graph's blocks, before any is computed.

        Args:
            feeding: Which blocks of nodes feed each block of candidates.
        """
        return Concatenated(self, feeding)


class States:
    """The states of a static graph's blocks during their computation."""

    def receive(self, number: int, z: Float[Tensor, "batch nodes *space"]) -> Float[Tensor, "batch targets *space"]:
        """Add the states of block ``number`` of nodes, and return the inputs of the next block.

        Called in order for all blocks except the last.
        """
        raise NotImplementedError


class Concatenated(States):
    """States of several blocks, concatenated to the sources of one product."""

    def __init__(self, propagate: Propagate, feeding: Sequence[slice]) -> None:
        self.propagate, self.feeding = propagate, feeding
        self.blocks: list[Tensor] = []

    def receive(self, number: int, z: Tensor) -> Tensor:
        """Return the product of all states that feed the next block."""
        self.blocks.append(z)
        sources = self.blocks[self.feeding[number]]
        return self.propagate(number, sources[0] if len(sources) == 1 else torch.cat(sources, dim=1))


def _within(part: range | None, whole: range) -> slice:
    part = whole if part is None else part
    return slice(part.start - whole.start, part.stop - whole.start)


class Propagation(nn.Module):
    """One way of computing I_v = Σ w_uv Z_u (Equation 2 of the paper) and its gradients.

    All implementations have the same result, and the gradients in :mod:`dnw_graph.propagation.gradient`.
    """

    def forward(self, edges: RealEdges, x: Float[Tensor, "batch ..."]) -> Propagate:
        """Prepare the real edges once and return the product, which a dynamics calls block by block.

        Args:
            edges: The real edges.
            x: The input of the graph, for its shape, dtype and device.
        """
        raise NotImplementedError
