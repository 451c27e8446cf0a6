"""The complete graph: the first stage of Lottery Ticket and Fine Tune."""

from __future__ import annotations

from torch import Tensor

from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.view import View


class Complete(Wiring):
    """All candidates are real, whatever k is.

    The first stage of arXiv 1903.01611. The graph remembers k, the number of edges that
    :func:`dnw_graph.wirings.two_stage.lottery_ticket` and :func:`dnw_graph.wirings.two_stage.fine_tune` keep.
    """

    ignores_k = True

    def choose(self, view: View) -> Tensor:
        """Return the flat indices of all candidates."""
        return self.largest(view, view.num_candidates)
