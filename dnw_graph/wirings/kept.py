"""What rules share whose real edges are state: those that stay, and those that change between steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dnw_graph._compat import version
from dnw_graph.errors import InputError
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.saved import refuse_counts, refuse_edges, refuse_mask
from dnw_graph.wirings.view import View


class Kept(Wiring):
    """Edges that are chosen by ``setup`` and stay; only they get a gradient.

    They are a persistent buffer, since they are not a function of the weights.

    Shapes:
        - ``index``: ``[num_edges]``, flat indices, ascending
    """

    gradient = "real"
    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.empty(0, dtype=torch.long))

    def choose(self, view: View) -> Tensor:
        """Return the edges that were chosen at the start; refuses what an average of buffers has made of them."""
        refuse_edges(self.index, view.num_candidates, view.k, f"{view.name}: wiring.index")
        return self.index

    def choose_to_train(self, view: View) -> Tensor:
        """Return the edges that were chosen at the start."""
        return self.index

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse other than k edges, distinct and ascending."""
        if "index" in saved:
            refuse_edges(saved["index"], num_candidates, num_edges, f"{name}: wiring.index")


class Stored(Wiring):
    """Edges that change between steps, and their number: persistent buffers, which averages of models copy.

    Shapes:
        - ``real``: ``[num_candidates]``, bool
        - ``count``: scalar, int64
    """

    real: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real", torch.empty(0, dtype=torch.bool))
        self.register_buffer("count", torch.tensor(0))
        self._found: tuple[Tensor, int, Tensor] | None = None  # ``real``, its version, and its edges

    def store(self, view: View, index: Int[Tensor, " edges"]) -> None:
        """Make these edges, in any order, the real ones."""
        self.real = torch.zeros_like(view.weight, dtype=torch.bool, requires_grad=False).index_fill_(0, index, True)
        self.count = self.real.new_full((), index.numel(), dtype=torch.long)

    def choose(self, view: View) -> Tensor:
        """Return the edges that are stored; synchronises with a device once per change.

        Raises:
            InputError: In evaluation, if their number is another, as after an average of buffers.
        """
        real = self.real
        if real.is_inference():  # which keeps no version
            return torch.nonzero(real).flatten()
        if self._found is None or self._found[0] is not real or self._found[1] != version(real):
            index = torch.nonzero(real).flatten()
            if not self.training and index.numel() != int(self.count):
                raise InputError(
                    f"{view.name}: wiring.real holds {index.numel():,} edges instead of {int(self.count):,}: an average"
                    " of models must copy this buffer and not average it, as AveragedModel(use_buffers=False) does"
                )
            self._found = real, version(real), index
        return self._found[2]

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse other edges than there were."""
        super().check_saved(saved, num_candidates, num_edges, name)
        refuse_counts(saved, ("count",), f"{name}: wiring")
        if "real" in saved:
            count = saved.get("count")
            counts = range(1, num_candidates + 1)
            if isinstance(count, Tensor) and not count.is_meta:
                counts = range(int(count), int(count) + 1)
            refuse_mask(saved["real"], num_candidates, counts, f"{name}: wiring.real")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "real" in state_dict:  # older files have the set alone
            state_dict = {prefix + "count": state_dict[prefix + "real"].sum(), **state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_found": None}
