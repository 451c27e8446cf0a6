"""Chooses the propagation."""

from __future__ import annotations

from torch import Tensor

from dnw_graph.ops.build import kernels
from dnw_graph.ops.call import readable
from dnw_graph.ops.layout import kernels_take, plain_eager
from dnw_graph.propagation.block import BlockPropagation
from dnw_graph.propagation.propagate import Propagate, Propagation, RealEdges
from dnw_graph.propagation.sparse import SparsePropagation


class AutoPropagation(Propagation):
    """The propagation that is faster according to ``benchmarks/propagation.py``.

    Sparse products (:class:`SparsePropagation`) on a CPU for weights in single or double precision, if few candidates
    are real, and if batch or blocks are large enough to pay for a layout with the images last. Otherwise dense blocks;
    also without compiled kernels, and when operators are traced or counted.

    Args:
        candidate_gradient: ``"exact"`` or ``"bfloat16"``: how sparse products compute the gradient of the candidates,
            see :class:`SparsePropagation`. The block path computes all products in one dtype, chosen by autocast.

    Attributes:
        MAX_DENSITY: Largest share of real edges among the candidates for sparse products.
        MIN_BATCH: Smallest number of images for which sparse products are used for blocks of any size.
        MIN_BLOCK: Smallest number of candidates per block for which they are used for any number of images.
    """

    MAX_DENSITY = 1 / 3
    MIN_BATCH = 16
    MIN_BLOCK = 2**18

    def __init__(self, candidate_gradient: str = "exact") -> None:
        super().__init__()
        self.block = BlockPropagation()
        self.sparse = SparsePropagation(candidate_gradient)

    def choose(self, edges: RealEdges, x: Tensor) -> Propagation:
        """Return the propagation for these edges and inputs of this shape, dtype and device."""
        candidates = edges.candidates
        sparse = (
            plain_eager()
            and kernels_take(candidates.weight)
            and readable(x)
            and (len(x) >= self.MIN_BATCH or candidates.num_candidates >= self.MIN_BLOCK * len(candidates.blocks))
            and edges.index.numel() <= self.MAX_DENSITY * candidates.num_candidates
            and kernels() is not None
        )
        return self.sparse if sparse else self.block

    def forward(self, edges: RealEdges, x: Tensor) -> Propagate:
        """Prepare the edges with the chosen propagation."""
        return self.choose(edges, x)(edges, x)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.sparse.extra_repr()})"
