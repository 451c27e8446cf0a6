"""Which weights of a layer are real in sparse momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dnw_graph._compat import version
from dnw_graph.arguments import checked, require
from dnw_graph.candidates import CandidateEdges
from dnw_graph.selection import select_top_k
from dnw_graph.wirings import Schedule, Wiring
from dnw_graph.wirings.saved import refuse_mask
from dnw_graph.wirings.schedule import as_schedule


class SparseMomentum(Wiring):
    """The real edges of sparse momentum: k random ones at first, then what :class:`SparseMomentumRounds` makes of them.

    The rule of one layer; the method itself works on all layers of a model together and needs the optimiser, so it is
    no name for ``wiring=…`` but an object, and does nothing without its rounds. Hallucinated weights are zero. They get
    the dense gradient, which the optimiser's momentum collects, but are not trained: the rounds set them back to zero
    after every step. The real edges are a persistent buffer.

    Args:
        prune_rate: Share of each layer's real weights that a round prunes, a number or a
            :class:`~dnw_graph.wirings.Schedule`. The published method decays it by a cosine or linearly over the whole
            training.

    Shapes:
        - ``kept``: ``[num_candidates]``, bool

    Raises:
        InputError: If the rate leaves 0 … 1.
    """

    updates_hallucinated = True
    kept: Tensor

    @checked
    def __init__(
        self,
        prune_rate: float | Schedule | Mapping[str, int | float | str] = Schedule(0.5, 0.0, shape="cosine"),  # noqa: B008
    ) -> None:
        super().__init__()
        self.prune_rate = as_schedule("prune_rate", prune_rate)
        possible = all(0 <= rate <= 1 for rate in (self.prune_rate.start, self.prune_rate.end))
        require(possible, "prune_rate", "a share of the real weights, within 0 … 1", prune_rate)
        self.register_buffer("kept", torch.empty(0, dtype=torch.bool))
        self._found: tuple[Tensor, int, Tensor] | None = None  # ``kept``, its version, and its edges

    def setup(self, candidates: CandidateEdges, num_edges: int, name: str) -> None:
        """Draw k edges at random, and set all other weights to zero."""
        weight = candidates.weight
        chosen = select_top_k(torch.rand_like(weight), num_edges, name)
        self.kept = torch.zeros_like(weight, dtype=torch.bool).index_fill_(0, chosen, True)
        with torch.no_grad():
            weight.mul_(self.kept)

    def choose(self, weight: Tensor, num_edges: int, name: str) -> Tensor:
        """Return the edges as the last round left them; the host waits for a device once per round."""
        kept = self.kept
        if kept.is_inference():  # which keeps no version
            return torch.nonzero(kept).flatten()
        if self._found is None or self._found[0] is not kept or self._found[1] != version(kept):
            self._found = kept, version(kept), torch.nonzero(kept).flatten()
        return self._found[2]

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse a state without a real edge; how many they are, the rounds decide."""
        if "kept" in saved:
            refuse_mask(saved["kept"], num_candidates, range(1, num_candidates + 1), f"{name}: wiring.kept")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_found": None}

    def extra_repr(self) -> str:
        """Options, for ``repr``."""
        return f"prune_rate={self.prune_rate}"
