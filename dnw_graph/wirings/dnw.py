"""Discovering neural wirings: the paper's own rule."""

from __future__ import annotations

from torch import Tensor

from dnw_graph.wirings.base import Wiring


class DNW(Wiring):
    """The k candidates of largest |w| are real; every candidate gets a gradient.

    Algorithm 1 of the paper: a hallucinated edge (u, v) is moved by ⟨Z_u, -α ∂L/∂I_v⟩ like a real one, and displaces
    the weakest real edge once its magnitude is larger.
    """

    updates_hallucinated = True

    def choose(self, weight: Tensor, num_edges: int, name: str) -> Tensor:
        """Return the flat indices of the k largest |w|, ties to the lower index."""
        return self.largest(weight, num_edges, name)
