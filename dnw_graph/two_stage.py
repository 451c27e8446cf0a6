"""Lottery Ticket and Fine Tune for whole models: a second training that starts from a trained complete graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.ranking import Ranking, rankings
from dnw_graph.wirings import FineTune, LotteryTicket


@checked
def fine_tune(complete: nn.Module) -> nn.Module:
    """Return a copy of a trained complete model that keeps the k strongest edges of each graph, to be retrained.

    "FT" in Section 3.3 of the paper. All parameters are those after training.

    Args:
        complete: A trained model with the wiring ``"complete"``, each graph of which knows its k.

    Raises:
        InputError: If the model has no graph.
    """
    model = copy.deepcopy(complete)
    for graph in _graphs(model):
        graph.rewire(FineTune(graph.view().weight), graph.num_edges)
    return model


@checked
def lottery_ticket(complete: nn.Module, initial: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a trained complete model that keeps the k strongest edges of each graph, reset to its beginning.

    "Lottery Ticket (one-shot)" in Section 3.3 of the paper. All parameters and buffers are those before training.

    Args:
        complete: A trained model with the wiring ``"complete"``, each graph of which knows its k.
        initial: Its ``state_dict`` before training.

    Raises:
        InputError: If the model has no graph or the state is of another model.
    """
    model = copy.deepcopy(complete)
    graphs = _graphs(model)
    trained = [graph.view().weight.detach().clone() for graph in graphs]
    try:
        model.load_state_dict(initial)
    except RuntimeError as error:
        raise InputError("the initial state is not of this model: give the state_dict from before training") from error
    for graph, weight in zip(graphs, trained, strict=True):
        graph.rewire(LotteryTicket(weight, graph.view().weight), graph.num_edges)
    return model


def _graphs(model: nn.Module) -> list[Ranking]:
    graphs = [graph for _, graph in rankings(model)]
    if not graphs:
        raise InputError(
            f"a {type(model).__name__} has no neural graph and no sparse weight, so there is no wiring to keep"
        )
    return graphs
