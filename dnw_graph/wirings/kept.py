"""What rules share that choose their edges once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.saved import refuse_edges


class Kept(Wiring):
    """Edges that are chosen by ``setup`` and stay; only they get a gradient.

    They are a persistent buffer, since they are not a function of the weights.

    Shapes:
        - ``index``: ``[num_edges]``, flat indices, ascending
    """

    updates_hallucinated = False
    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.empty(0, dtype=torch.long))

    def choose(self, weight: Tensor, num_edges: int, name: str) -> Tensor:
        """Return the edges that were chosen at the start."""
        return self.index

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse other than k edges, distinct and ascending."""
        if "index" in saved:
            refuse_edges(saved["index"], num_candidates, num_edges, f"{name}: wiring.index")
