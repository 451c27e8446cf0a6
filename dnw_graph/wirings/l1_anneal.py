"""Pruning while training: L1 + Anneal."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from dnw_graph._compat import not_compiled
from dnw_graph.arguments import checked, require
from dnw_graph.wirings.schedule import Changing, Schedule, as_schedule, share_over_time
from dnw_graph.wirings.stored_edges import ChangingEdges
from dnw_graph.wirings.view import View

REMOVAL = Schedule(0.0, 1.0, 0.0, 0.25, "cubic")


class L1Anneal(ChangingEdges):
    r"""Starts with all candidates and removes the edges of smallest |w| during training, until k are left.

    "L1 + Anneal" in Section 3.3 of the paper (arXiv 1906.00586). At step t the graph has n - s(t) (n - k) edges, n
    being the number of candidates and s the schedule ``removal``; a removed edge gets no gradient and stays removed.
    The penalty of the loss is :math:`\lambda(t) \sum_{(u,v) \in E} |w_{uv}|`: add :func:`dnw_graph.wiring_penalty` to
    the loss, as the examples do. A schedule that is not constant needs :func:`dnw_graph.attach`. Every training step
    synchronises with the device once, to find out which edges are left.

    The paper gives no values. The defaults come from a small search on held-out training images, described on the
    documentation's page on rules.

    Args:
        strength: λ, a number or a :class:`Schedule`.
        removal: s, from 0 (complete) to 1 (k edges left), a :class:`Schedule`.

    Shapes:
        - ``real``: ``[num_candidates]``, uint8

    Raises:
        InputError: If a strength is negative, or ``removal`` decreases or leaves 0 … 1.
    """

    gradient = "real"

    @checked
    def __init__(
        self,
        strength: Changing = 1e-6,
        removal: Schedule | Mapping[str, int | float | str] = REMOVAL,
    ) -> None:
        super().__init__()
        self.strength = as_schedule("strength", strength)
        self.removal = share_over_time("removal", removal)
        require(self.removal.start <= self.removal.end, "removal", "a schedule that increases", removal)

    @not_compiled  # would be compiled anew for every step
    def choose_to_train(self, view: View) -> Tensor:
        """Remove the edges that are due in this step, and return the others."""
        share = self.removal.at(view)
        # Never more than exist: a graph that gets the rule during training keeps its edges until removal is due.
        edges = self.choose(view)
        keep = min(edges.numel(), view.num_candidates - round(share * (view.num_candidates - view.k)))
        chosen = self.largest(view, keep, among=edges)
        if keep < edges.numel():
            self.store(view, chosen)
        return chosen

    def penalty(self, view: View) -> Float[Tensor, ""]:
        """Return λ Σ |w| over the edges that are left."""
        return self.strength.at(view) * (view.weight.abs() * self.real).sum()
