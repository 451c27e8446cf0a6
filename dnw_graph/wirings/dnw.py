"""Discovering neural wirings: the paper's rule."""

from __future__ import annotations

from torch import Tensor

from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.view import View


class DNW(Wiring):
    r"""The k candidates of largest |w| are real; every candidate gets a gradient.

    Algorithm 1 of the paper (arXiv 1906.00586): the weight of a hallucinated edge (u, v) changes by
    :math:`\langle Z_u, -\alpha \, \partial L/\partial I_v \rangle` like that of a real one, and the edge replaces the
    weakest real one once its magnitude is larger.
    """

    def choose(self, view: View) -> Tensor:
        """Return the flat indices of the k largest |w|, ties to the lower index."""
        return self.largest(view, view.k)
