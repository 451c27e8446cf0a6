"""The choice between the ways of propagation."""

from __future__ import annotations

import torch

from dnw_graph.propagation.base import Propagate, Propagation, RealEdges
from dnw_graph.propagation.block import BlockPropagation
from dnw_graph.propagation.message_passing import MessagePassingPropagation


class AutoPropagation(Propagation):
    """The way that ``benchmarks/propagation.py`` measured as the faster one.

    Sparse products (:class:`MessagePassingPropagation` with ``adjacency="csr"``) on a CPU, in single or double
    precision, where blocks are large and real edges few; the block path everywhere else. Within the bounds below, the
    sparse products took 0.5 to 0.8 times as long in evaluation and 0.65 to 1 times in training, where the dense
    gradient of the candidates is common to both; beyond them they gained little or lost.

    Attributes:
        MAX_DENSITY: Largest share of real edges among the candidates for sparse products.
        MIN_BLOCK: Smallest number of candidates per block for sparse products.
    """

    MAX_DENSITY = 0.06
    MIN_BLOCK = 2**19

    def __init__(self) -> None:
        super().__init__()
        self.block = BlockPropagation()
        self.sparse = MessagePassingPropagation("csr")

    def choose(self, edges: RealEdges) -> Propagation:
        """Return the way for these edges."""
        weight, candidates = edges.candidates.weight, edges.candidates
        sparse = (
            weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and edges.index.numel() <= self.MAX_DENSITY * candidates.num_candidates
            and candidates.num_candidates >= self.MIN_BLOCK * len(candidates.blocks)
        )
        return self.sparse if sparse else self.block

    def forward(self, edges: RealEdges) -> Propagate:
        """Prepare the edges in the way chosen."""
        return self.choose(edges)(edges)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
