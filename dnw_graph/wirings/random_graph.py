"""Randomly wired graphs: the paper's primary baseline, RG."""

from __future__ import annotations

import torch
from torch import Tensor

from dnw_graph.candidates import CandidateEdges
from dnw_graph.selection import select_top_k
from dnw_graph.wirings.base import Wiring


class RandomGraph(Wiring):
    """The k edges of largest |initial weight|, fixed; only they get a gradient.

    Section 3 of the paper. The edges are a persistent buffer: they are not a function of the trained weights.

    Args:
        separate_scores: Draw the edges by random scores of their own instead of the initial weights, so that the
            weights of the chosen edges keep the full uniform distribution.

    Shapes:
        - ``index``: ``[num_edges]``, flat indices, ascending
    """

    updates_hallucinated = False
    index: Tensor

    def __init__(self, separate_scores: bool = False) -> None:
        super().__init__()
        self.separate_scores = separate_scores
        self.register_buffer("index", torch.empty(0, dtype=torch.long))

    def setup(self, candidates: CandidateEdges, num_edges: int, name: str) -> None:
        """Draw the edges of a graph."""
        weight = candidates.weight.detach()
        scores = torch.rand_like(weight) if self.separate_scores else weight
        self.index = select_top_k(scores, num_edges, name)

    def choose(self, weight: Tensor, num_edges: int, name: str) -> Tensor:
        """Return the edges drawn at the start."""
        return self.index

    def extra_repr(self) -> str:
        """Options, for ``repr``."""
        return "separate_scores=True" if self.separate_scores else ""
