"""RigL: Rigging the Lottery."""

from __future__ import annotations

from dnw_graph.arguments import checked
from dnw_graph.wirings.prune_and_grow import PruneAndGrow
from dnw_graph.wirings.schedule import Schedule, share_over_time


class RigL(PruneAndGrow):
    r"""Drops the weakest edges at intervals, and grows those of largest gradient (Evci et al. 2020).

    arXiv 1911.11134 and google-research/rigl. Starts with k random edges. A round follows step
    :math:`t = \Delta T, 2 \Delta T, \dots < T_\text{end}`: :math:`\lfloor f(t) k \rfloor` real edges of least |w| are
    dropped, with

    .. math:: f(t) = \tfrac{\alpha}{2} (1 + \cos(\pi t / T_\text{end})),

    and as many are grown by the largest :math:`|\langle Z_u, \partial L/\partial I_v \rangle|` among all that are not
    kept. An edge that is dropped and grown again keeps its weight and optimiser state; new ones start at zero.
    Hallucinated weights and their optimiser states are zero, and are not trained. The gradient of all candidates is
    computed only in steps with a round, by ``loss.backward()``; a ``.grad`` of other origin is refused there.

    In a step with a round, only parameters other than the candidates are updated; in the published code, none are. A
    round that would exchange no edge is skipped; its step is an ordinary one. With Adam, the first update of a
    grown edge is about three times the learning rate.

    Args:
        alpha: α, the share of edges in the first round.
        every: ΔT, steps between rounds; None: one round per epoch.
        until: T_end, a step or a fraction of training.
        skip_update: Whether the candidates are not updated in a step with a round.

    Shapes:
        - ``real``: ``[num_candidates]``, uint8

    Raises:
        InputError: If α is not in 0 … 1, ``every`` below 1, or ``until`` neither a step nor a fraction.
    """

    @checked
    def __init__(
        self, alpha: float = 0.3, every: int | None = 100, until: int | float = 0.75, skip_update: bool = True
    ) -> None:
        super().__init__(share_over_time("alpha", Schedule(alpha, 0.0, 0, until, "cosine")), every)
        self.alpha, self.until, self.skip_update = alpha, until, skip_update
