"""The paper's ablation: top-k without the update rule."""

from __future__ import annotations

from torch import Tensor

from dnw_graph.wirings.base import Wiring


class NoUpdate(Wiring):
    """The k candidates of largest |w| are real; hallucinated ones get no gradient.

    "No Update Rule" in Section 3.3 of the paper: a hallucinated edge becomes real only when a real one has fallen below
    it. Its gradient is zero, so that momentum and weight decay still move its weight.
    """

    updates_hallucinated = False

    def choose(self, weight: Tensor, num_edges: int, name: str) -> Tensor:
        """Return the flat indices of the k largest |w|, ties to the lower index."""
        return self.largest(weight, num_edges, name)
