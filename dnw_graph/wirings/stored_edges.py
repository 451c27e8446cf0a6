"""Bases of rules whose real edges are state: constant edges, and edges that change between steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dnw_graph._compat import version
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.saved import edge_sum, refuse_edges, refuse_mask, refuse_spoiled
from dnw_graph.wirings.view import View


class ConstantEdges(Wiring):
    """Edges that ``setup`` chooses and that never change; only they get a gradient.

    They are a persistent buffer, since they are not a function of the weights. Their checksum, another buffer, reveals
    whether the buffers were averaged.

    Shapes:
        - ``index``: ``[num_edges]``, flat indices, ascending
        - ``checksum``: scalar, int64
    """

    gradient = "real"
    index: Tensor
    checksum: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.empty(0, dtype=torch.long))
        self.register_buffer("checksum", torch.tensor(0))

    def store(self, index: Int[Tensor, " edges"]) -> None:
        """Make these edges, ascending, the real ones."""
        self.index, self.checksum = index, edge_sum(index)

    def choose(self, view: View) -> Tensor:
        """Return the edges that were chosen at the start.

        Raises:
            InputError: If the buffers changed, as by averaging.
        """
        refuse_spoiled(self.index, self.checksum, f"{view.name}: wiring.index")
        return self.index

    def choose_to_train(self, view: View) -> Tensor:
        """Return the edges that were chosen at the start."""
        return self.index

    def leave(self, stay: Bool[Tensor, " candidates"]) -> None:
        """Keep the edges among the candidates that stay, by their new indices."""
        self.store((stay.cumsum(0) - 1)[self.index[stay[self.index]]])

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse edges that are not k distinct ascending ones, or that do not match their checksum."""
        if "index" in saved:
            refuse_edges(saved["index"], num_candidates, num_edges, f"{name}: wiring.index")
            refuse_spoiled(saved["index"], saved.get("checksum"), f"{name}: wiring.index")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "index")
        if saved is not None:  # Older files have no checksum.
            state_dict = {prefix + "checksum": edge_sum(saved), **state_dict}
            if saved.shape != self.index.shape:  # check_saved has accepted the number.
                self.index = self.index.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ChangingEdges(Wiring):
    """Edges that change between steps, as does their number: persistent buffers, which an average of models must copy.

    The buffer is a mask of bytes, since PyTorch's averaging cannot subtract booleans. A checksum reveals whether the
    mask was averaged.

    Shapes:
        - ``real``: ``[num_candidates]``, uint8
        - ``checksum``: scalar, int64
    """

    real: Tensor
    checksum: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real", torch.empty(0, dtype=torch.uint8))
        self.register_buffer("checksum", torch.tensor(0))
        self._found: tuple[Tensor, tuple[int, bool], Tensor] | None = None  # The last ``real``, and its edges.

    def setup(self, view: View) -> None:
        """Start with the complete graph."""
        self.store(view, torch.arange(view.num_candidates, device=view.weight.device))

    @property
    def mask(self) -> Bool[Tensor, " candidates"]:
        """Which candidates are stored as real."""
        return self.real.view(torch.bool)

    def store(self, view: View, index: Int[Tensor, " edges"]) -> None:
        """Make these edges, in any order, the real ones."""
        self.real = index.new_zeros(view.num_candidates, dtype=torch.uint8).index_fill_(0, index, 1)
        self.checksum = edge_sum(index)

    def choose(self, view: View) -> Tensor:
        """Return the edges that are stored; synchronises with a device once per change.

        Raises:
            InputError: In evaluation, if the buffers changed, as by averaging.
        """
        state = version(self.real), self.training
        # Inference tensors have no version.
        if self._found is None or self._found[0] is not self.real or self._found[1] != state or state[0] == -1:
            index = torch.nonzero(self.real).flatten()
            if not self.training:
                refuse_spoiled(index, self.checksum, f"{view.name}: wiring.real")
            self._found = self.real, state, index
        return self._found[2]

    def leave(self, stay: Bool[Tensor, " candidates"]) -> None:
        """Keep the edges among those that stay."""
        self.real = self.real[stay]
        self.checksum = edge_sum(torch.nonzero(self.real).flatten())

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse edges that do not match their checksum."""
        super().check_saved(saved, num_candidates, num_edges, name)
        if "real" in saved:
            refuse_mask(saved["real"], num_candidates, f"{name}: wiring.real")
            refuse_spoiled(saved["real"], saved.get("checksum"), f"{name}: wiring.real")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "real" in state_dict:  # Older files have booleans, no checksum, or a count.
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "count"}
            real = state_dict[prefix + "real"].to(torch.uint8)
            state_dict = {prefix + "checksum": edge_sum(real), **state_dict, prefix + "real": real}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_found": None}
