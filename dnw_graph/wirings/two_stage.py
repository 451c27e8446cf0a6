"""Lottery Ticket and Fine Tune: retrain the wiring of a trained complete graph, as rules and for whole models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.selection import select_top_k
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.stored_edges import ConstantEdges
from dnw_graph.wirings.view import View

UNKNOWN = -1


class SecondStage(ConstantEdges):
    """The k edges of largest |w| of a trained complete graph, constant; trained again, from other weights.

    Args:
        trained: Candidate weights of the complete graph after its training, which decide the edges. Without them the
            rule waits for a checkpoint that holds the edges.
        initial: Candidate weights that the graph starts from.

    Shapes:
        - ``trained``, ``initial``: ``[num_candidates]``

    Raises:
        InputError: If the number of weights is not the graph's, or if unknown edges are requested.
    """

    @checked
    def __init__(
        self,
        trained: Float[Tensor, " candidates"] | None = None,
        initial: Float[Tensor, " candidates"] | None = None,
    ) -> None:
        super().__init__()
        self.complete = None if trained is None else trained.detach().clone()
        same = initial is trained
        self.start = self.complete if same else None if initial is None else initial.detach().clone()
        self.known = False  # Whether the edges are known; on the host, to avoid synchronisation.

    def setup(self, view: View) -> None:
        """Choose the edges and set the candidate weights."""
        if self.complete is None or self.start is None:
            self.store(torch.full((view.k,), UNKNOWN, device=view.weight.device))
            self.known = False
            return
        for weight in (self.complete, self.start):
            if weight.shape != view.weight.shape:
                raise InputError(
                    f"{view.name}: {type(self).__name__} was given {list(weight.shape)} weights for "
                    f"{view.num_candidates} candidates: give those of the complete graph of the same blocks"
                )
        self.store(select_top_k(self.complete.to(view.weight.device), view.k, view.name))
        self.known = True
        view.weight.copy_(self.start)

    def setup_loaded(self, view: View) -> None:
        """Keep the edges, those of the trained complete graph, and the loaded weights."""

    def choose(self, view: View) -> Tensor:
        """Return the edges of the trained complete graph."""
        if not self.known:
            raise InputError(
                f"{view.name}: {type(self).__name__} needs a trained complete graph: train one with wiring 'complete', "
                "then use dnw_graph.wirings.two_stage or, in the examples, --complete DIRECTORY; or load a checkpoint"
            )
        return super().choose(view)

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse anything but k distinct ascending edges, or k unknown ones."""
        index = saved.get("index")
        if isinstance(index, Tensor) and not index.is_meta and index.numel() and bool((index == UNKNOWN).all()):
            saved = {"index": torch.arange(len(index)).to(index.dtype)}
        super().check_saved(saved, num_candidates, num_edges, name)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        index = state_dict.get(prefix + "index")
        if index is not None:
            self.known = bool((index != UNKNOWN).all())


class FineTune(SecondStage):
    """The wiring and the weights of a trained complete graph, retrained, usually at another learning rate.

    "FT" in Section 3.3 of the paper (arXiv 1906.00586). For a whole model: :func:`fine_tune`.

    Args:
        trained: Candidate weights of the complete graph after its training, which decide the edges and which the graph
            starts from. Without them the rule waits for a checkpoint that holds the edges.

    Shapes:
        - ``trained``: ``[num_candidates]``

    Raises:
        InputError: If the number of weights is not the graph's, or if unknown edges are requested.
    """

    @checked
    def __init__(self, trained: Float[Tensor, " candidates"] | None = None) -> None:
        super().__init__(trained, trained)


class LotteryTicket(SecondStage):
    """The wiring of a trained complete graph, its weights reset to the initial ones, retrained (one-shot pruning).

    "Lottery Ticket" in Section 3.3 of the paper, after arXiv 1903.01611. For a whole model, whose other parameters are
    reset as well: :func:`lottery_ticket`.

    Args:
        trained: Candidate weights of the complete graph after its training, which decide the edges. Without them the
            rule waits for a checkpoint that holds the edges.
        initial: Its candidate weights before training, which the graph starts from.

    Shapes:
        - ``trained``, ``initial``: ``[num_candidates]``

    Raises:
        InputError: If the number of weights is not the graph's, or if unknown edges are requested.
    """


@checked
def fine_tune(complete: nn.Module) -> nn.Module:
    """Return a copy of a trained complete model with the k strongest edges of each graph, ready for retraining.

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
    """Return a copy of a trained complete model with the k strongest edges of each graph, reset to its initial state.

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


def _graphs(model: nn.Module) -> list[Any]:
    """Return the neural graphs and the graphs of sparse layers of a model: the modules that have a rule."""
    graphs = [module for module in model.modules() if isinstance(getattr(module, "wiring", None), Wiring)]
    if not graphs:
        raise InputError(
            f"a {type(model).__name__} has no neural graph and no sparse weight, so there is no wiring to keep"
        )
    return graphs
