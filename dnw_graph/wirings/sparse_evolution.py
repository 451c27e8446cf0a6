"""Sparse evolutionary training."""

from __future__ import annotations

from torch import Tensor

from dnw_graph.arguments import checked
from dnw_graph.wirings.prune_and_grow import PruneAndGrow
from dnw_graph.wirings.schedule import Changing, share_over_time
from dnw_graph.wirings.view import View


class SET(PruneAndGrow):
    r"""Drops the weakest edges once per epoch, and grows as many at random (Mocanu et al. 2018).

    arXiv 1707.04780. Starts with k random edges. Every ``every`` steps the
    :math:`d = \min(\lfloor \zeta k \rfloor, n - k)` real edges of least |w| are dropped, and d others are grown at
    random among all that are not kept, except after the last step of training, if ``attach`` knows their number. Grown
    edges start with weight and optimiser state zero. Hallucinated weights and their optimiser states are zero, and are
    not trained.

    The paper, and jaxpruner's ``sparse_trainers``, differ: the paper prunes positive and negative weights apart, and
    grows edges with random values. With Adam, the first update of a grown edge is about three times the learning rate.

    Args:
        fraction: ζ, a number in 0 … 1 or a :class:`~dnw_graph.wirings.Schedule`.
        every: Steps between rounds. Default: those of an epoch.

    Shapes:
        - ``real``: ``[num_candidates]``, uint8

    Raises:
        InputError: If ζ is not in 0 … 1, or ``every`` below 1.
    """

    grows_by_gradient = False
    regrown_are_new = True

    @checked
    def __init__(self, fraction: Changing = 0.3, every: int | None = None) -> None:
        super().__init__(share_over_time("fraction", fraction), every)

    def number(self, view: View, step: int) -> int:
        """Return d."""
        return min(super().number(view, step), view.num_candidates - view.k)

    def scores(self, view: View) -> Tensor:
        """Return random numbers."""
        return view.random_scores(view.generator())
