"""Pruning while training: L1 + Anneal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dnw_graph._compat import not_compiled
from dnw_graph.arguments import checked, require
from dnw_graph.candidates import CandidateEdges
from dnw_graph.wirings.saved import refuse_mask
from dnw_graph.wirings.schedule import Schedule, Scheduled, as_schedule


class L1Anneal(Scheduled):
    r"""Starts complete and removes the edges of smallest |w| while training goes on, until k are left.

    "L1 + Anneal" in Section 3.3 of the paper. At step t the graph has n - s(t) (n - k) edges, n being the number of
    candidates and s the schedule ``removal``; a removed edge gets no gradient and never comes back. The loss gains
    :math:`\lambda(t) \sum_{(u,v) \in E} |w_{uv}|`: add :func:`dnw_graph.wiring_penalty` to it, as the examples do.
    Every step of training waits for the device once, to learn which edges are left.

    The paper gives no numbers. The defaults come from a small search on held-out training images, see the page on ways
    of finding a wiring in the documentation.

    Args:
        strength: λ, a number or a :class:`Schedule`.
        removal: s, from 0 (complete) to 1 (k edges left), a :class:`Schedule`.
        num_steps: See :class:`Scheduled`.

    Shapes:
        - ``removed``: ``[num_candidates]``, bool

    Raises:
        InputError: If a strength is negative, or the removal leaves 0 … 1 or goes back.
    """

    updates_hallucinated = False
    removed: Tensor

    @checked
    def __init__(
        self,
        strength: float | Schedule | Mapping[str, int | float | str] = 1e-6,
        removal: Schedule | Mapping[str, int | float | str] = Schedule(0.0, 1.0, 0.0, 0.25, "cubic"),  # noqa: B008
        *,
        num_steps: int | None = None,
    ) -> None:
        super().__init__(num_steps)
        self.strength = as_schedule("strength", strength)
        self.removal = as_schedule("removal", removal)
        require(min(self.strength.start, self.strength.end) >= 0, "strength of the L1 term", "0 or more", strength)
        rises = 0 <= self.removal.start <= self.removal.end <= 1
        require(rises, "removal", "a schedule that goes up within 0 (complete) … 1 (k edges left)", removal)
        self.register_buffer("removed", torch.empty(0, dtype=torch.bool))

    def setup(self, candidates: CandidateEdges, num_edges: int, name: str) -> None:
        """Start with the complete graph."""
        super().setup(candidates, num_edges, name)
        self.removed = torch.zeros_like(candidates.weight, dtype=torch.bool)

    def choose(self, weight: Tensor, num_edges: int, name: str) -> Tensor:
        """Return the edges that are left."""
        return torch.nonzero(~self.removed).flatten()

    @not_compiled  # would be compiled anew for every step
    def choose_to_train(self, weight: Tensor, num_edges: int, name: str) -> Tensor:
        """Remove as many edges as this step asks for, and return the others."""
        self.begin_step(self.strength, self.removal)
        share = self.now(self.removal)
        weight = weight.detach()
        left = self.choose(weight, num_edges, name)
        # Never more than there are: a graph that was given to the rule half-way stays as it is until its time comes.
        keep = min(left.numel(), weight.numel() - round(share * (weight.numel() - num_edges)))
        chosen = left[self.largest(weight[left], keep, name)]
        if keep < left.numel():
            self.removed = torch.ones_like(self.removed).index_fill_(0, chosen, False)
        return chosen

    def penalty(self, weight: Tensor) -> Float[Tensor, ""]:
        """Return λ Σ |w| over the edges that are left."""
        return self.now(self.strength) * (weight.abs() * ~self.removed).sum()

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse a state that leaves fewer than k edges."""
        super().check_saved(saved, num_candidates, num_edges, name)
        if "removed" in saved:
            counts = range(num_candidates - num_edges + 1)
            refuse_mask(saved["removed"], num_candidates, counts, f"{name}: wiring.removed")

    def extra_repr(self) -> str:
        """Options, for ``repr``."""
        return f"strength={self.strength}, removal={self.removal}"
