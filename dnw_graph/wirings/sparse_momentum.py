"""Sparse momentum: real edges move within and between graphs (Dettmers and Zettlemoyer 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.wirings.proportion import allot
from dnw_graph.wirings.prune_and_grow import PruneAndGrow
from dnw_graph.wirings.schedule import Changing, Schedule, share_over_time
from dnw_graph.wirings.view import View

COSINE = Schedule(0.5, 0.0, shape="cosine")


class SparseMomentum(PruneAndGrow):
    r"""Prunes a share of each graph's weakest edges, and grows as many where the momentum is largest.

    arXiv 1907.04840. The graphs of a model that have the rule share one budget. After every ``every`` steps a round

    1. computes, for each graph i, the mean magnitude m_i of the momentum of its real edges;
    2. prunes, of its n_i real edges, the ⌈p · n_i⌉ of smallest magnitude;
    3. distributes R, the number of edges pruned in all graphs, over the graphs in proportion to m_i;
    4. grows that many edges in each graph, among those that are not real, by the largest magnitude of momentum.

    A grown edge starts at zero, unless the same round pruned it. The momentum is that of SGD, or
    m / (√v + 1e-8) of Adam, as in the published code. All candidates get the gradient, which the momentum collects;
    hallucinated weights are set back to zero after every step.

    As published (arXiv 1907.04840 and its code): steps 1 to 4 and their order; p decreases from 0.5 by a cosine or
    linearly; the mean is over the real edges before pruning; an edge that is pruned and grown in the same round keeps
    its value; pruned edges keep their momentum; the mask is applied after every step. Different here:

    - The total number of real edges never changes. The published code draws the first edges independently, each with a
      probability, rounds layer by layer and corrects the total in later rounds.
    - A graph can become complete; excess edges go to the others, again in proportion to their momentum. The published
      code stops at 99% of the zero weights and distributes the excess evenly.
    - Pruning leaves at least one edge in a graph. The published code prunes less in a layer that is more than 80% dense
      and whose momentum is large; here all are pruned alike.
    - p ends at 0, and no round follows the last step of training, if ``attach`` knows their number: edges grown there
      would have weight 0. In the published code the cosine ends at 0.005.
    - Ties go to the lower index, and fractions of an edge to the largest remainders.
    - A round follows the last step of an epoch, before the evaluation; in the published code it comes after it.

    Args:
        prune_rate: p, a number or a :class:`~dnw_graph.wirings.Schedule`.
        every: Steps between rounds. Default: those of an epoch.

    Shapes:
        - ``real``: ``[num_candidates]``, uint8

    Raises:
        InputError: If the rate is outside 0 … 1; in a round, if the momentum is not finite.
    """

    trained = "all"
    grows_by_gradient = False
    needs_momentum = True

    @checked
    def __init__(self, prune_rate: Changing = COSINE, every: int | None = None) -> None:
        super().__init__(share_over_time("prune_rate", prune_rate), every)
        self.prune_rate = self.fraction

    def num_edges(self, k: int) -> int:
        """Return the number of edges of this graph after the rounds so far."""
        return int(self.mask.sum())

    def number(self, view: View, step: int) -> int:
        """Return how many edges a round prunes: ⌈p · n_i⌉, but not all."""
        edges = self.num_edges(view.k)
        return min(math.ceil(self.share(view, step, edges)), edges - 1)

    def scores(self, view: View) -> Float[Tensor, " candidates"]:
        """Return the momentum."""
        state = view.state
        momentum = view.momentum / (state["exp_avg_sq"].sqrt() + 1e-8) if "exp_avg_sq" in state else view.momentum
        if not momentum.isfinite().all():
            raise InputError(f"{view.name}: the momentum is NaN or infinite; lower the learning rate")
        return momentum

    def after_step(self, view: View) -> None:
        """Set hallucinated weights back to zero."""
        view.clear(~self.mask, state=False)

    @classmethod
    def after_steps(cls, views: Sequence[View]) -> None:
        """Do a round over all graphs whose round is due."""
        super().after_steps(views)
        rules = [(rule, view) for view in views if isinstance(rule := view.wiring, cls)]
        due = [(rule, view, rule.scores(view)) for rule, view in rules if rule.is_round(view, view.step)]
        pruned = [rule.number(view, view.step) for rule, view, _ in due]
        room = [(0, int((~rule.mask).sum()) + number) for (rule, *_), number in zip(due, pruned, strict=True)]
        means = [float(momentum[rule.mask].abs().mean(dtype=torch.float64)) for rule, _, momentum in due]
        grown = allot(sum(pruned), means, room)
        for (rule, view, momentum), number, new in zip(due, pruned, grown, strict=True):
            rule.exchange(view, number, new, momentum)
