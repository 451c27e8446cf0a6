"""One-shot lottery tickets."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from dnw_graph.arguments import checked
from dnw_graph.wirings.second_stage import SecondStage


class LotteryTicket(SecondStage):
    """The wiring of a trained complete graph, its weights reset to the initial ones, retrained (one-shot pruning).

    "Lottery Ticket" in Section 3.3 of the paper, after Frankle et al. For a whole model, whose other parameters are
    reset as well: :func:`dnw_graph.two_stage.lottery_ticket`.

    Args:
        trained: Candidate weights of the complete graph after its training, which decide the edges. Without them the
            rule waits for a checkpoint that holds the edges.
        initial: Its candidate weights before training, which the graph starts from.

    Shapes:
        - ``trained``, ``initial``: ``[num_candidates]``

    Raises:
        InputError: If the number of weights is not the graph's; if edges are asked for that are not known.
    """

    @checked
    def __init__(
        self,
        trained: Float[Tensor, " candidates"] | None = None,
        initial: Float[Tensor, " candidates"] | None = None,
    ) -> None:
        super().__init__(trained, initial)
