"""What Lottery Ticket and Fine Tune share: the wiring of a trained complete graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dnw_graph.arguments import checked
from dnw_graph.candidates import CandidateEdges
from dnw_graph.errors import InputError
from dnw_graph.selection import select_top_k
from dnw_graph.wirings.kept import Kept

UNKNOWN = -1


class SecondStage(Kept):
    """The k edges of largest |w| of a trained complete graph, fixed; retrained from other weights.

    Args:
        trained: Candidate weights of the complete graph after its training, which decide the edges. Without them the
            rule waits for a checkpoint that holds the edges.
        start: Candidate weights that the graph starts from.

    Shapes:
        - ``trained``, ``start``: ``[num_candidates]``

    Raises:
        InputError: If the number of weights is not the graph's; if edges are asked for that are not known.
    """

    @checked
    def __init__(
        self, trained: Float[Tensor, " candidates"] | None, start: Float[Tensor, " candidates"] | None
    ) -> None:
        super().__init__()
        self.trained = None if trained is None else trained.detach().clone()
        same = start is trained
        self.start = self.trained if same else None if start is None else start.detach().clone()
        self.known = False  # whether the edges are; on the host, which could not look at them without waiting

    def setup(self, candidates: CandidateEdges, num_edges: int, name: str) -> None:
        """Choose the edges and set the candidate weights."""
        if self.trained is None or self.start is None:
            self.index = torch.full((num_edges,), UNKNOWN, device=candidates.weight.device)
            self.known = False
            return
        for weight in (self.trained, self.start):
            if weight.shape != candidates.weight.shape:
                raise InputError(
                    f"{name}: {type(self).__name__} was given {list(weight.shape)} weights for "
                    f"{candidates.num_candidates} candidates: give those of the complete graph of the same blocks"
                )
        self.index = select_top_k(self.trained.to(candidates.weight.device), num_edges, name)
        self.known = True
        with torch.no_grad():
            candidates.weight.copy_(self.start)

    def choose(self, weight: Tensor, num_edges: int, name: str) -> Tensor:
        """Return the edges of the trained complete graph."""
        if not self.known:
            raise InputError(
                f"{name}: {type(self).__name__} needs a trained complete graph: train one with wiring 'complete', then "
                "use dnw_graph.two_stage or, in the examples, --complete FOLDER; or load a checkpoint"
            )
        return self.index

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse other than k edges, distinct and ascending, or as many that are all unknown."""
        index = saved.get("index")
        if isinstance(index, Tensor) and not index.is_meta and index.numel() and bool((index == UNKNOWN).all()):
            saved = {**saved, "index": torch.arange(len(index)).to(index.dtype)}
        super().check_saved(saved, num_candidates, num_edges, name)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        index = state_dict.get(prefix + "index")
        if index is not None:
            self.known = bool((index != UNKNOWN).all())
