"""Pruning a trained complete graph, and fine-tuning."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from dnw_graph.arguments import checked
from dnw_graph.wirings.second_stage import SecondStage


class FineTune(SecondStage):
    """The wiring and the weights of a trained complete graph, retrained, as a rule at another learning rate.

    "FT" in Section 3.3 of the paper. For a whole model: :func:`dnw_graph.two_stage.fine_tune`.

    Args:
        trained: Candidate weights of the complete graph after its training, which decide the edges and which the graph
            starts from. Without them the rule waits for a checkpoint that holds the edges.

    Shapes:
        - ``trained``: ``[num_candidates]``

    Raises:
        InputError: If the number of weights is not the graph's; if edges are asked for that are not known.
    """

    @checked
    def __init__(self, trained: Float[Tensor, " candidates"] | None = None) -> None:
        super().__init__(trained, trained)
