"""Bases of rules whose real edges are state: constant edges, and edges that change between steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dnw_graph._compat import unwrapped_tensor, version
from dnw_graph.errors import InputError
from dnw_graph.ops.layout import transformed
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.saved import edge_sum, refuse_edges, refuse_mask, refuse_spoiled
from dnw_graph.wirings.view import View


class StoredEdges(Wiring):
    """Edges that are not a function of the weights, in a persistent buffer, which an average of models must copy.

    Their checksum, another buffer, reveals whether the buffers were averaged.

    Attributes:
        buffer: Name of the buffer.

    Shapes:
        - ``checksum``: scalar, int64
    """

    buffer: ClassVar[tuple[str, torch.dtype]]
    checksum: Tensor

    def __init__(self) -> None:
        super().__init__()
        name, dtype = self.buffer
        self.register_buffer(name, torch.empty(0, dtype=dtype))
        self.register_buffer("checksum", torch.tensor(0))

    def refuse(self, saved: object, num_candidates: int, num_edges: int, what: str) -> None:
        """Refuse values that the buffer cannot have."""
        raise NotImplementedError

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse edges that the rule cannot have, or that do not match their checksum."""
        super().check_saved(saved, num_candidates, num_edges, name)
        if self.buffer[0] in saved:
            edges, what = saved[self.buffer[0]], f"{name}: wiring.{self.buffer[0]}"
            self.refuse(edges, num_candidates, num_edges, what)
            refuse_spoiled(edges, saved.get("checksum"), what)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        name, dtype = self.buffer
        saved = state_dict.get(prefix + name)
        if saved is not None:  # Older files have no checksum, or a mask of booleans.
            state_dict = {prefix + "checksum": edge_sum(saved), **state_dict, prefix + name: saved.to(dtype)}
            if saved.shape != getattr(self, name).shape:  # check_saved has accepted the number.
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class ConstantEdges(StoredEdges):
    """Edges that ``setup`` chooses and that never change; only they get a gradient.

    Shapes:
        - ``index``: ``[num_edges]``, flat indices, ascending
    """

    gradient = "real"
    buffer = "index", torch.int64
    index: Tensor

    def store(self, index: Int[Tensor, " edges"]) -> None:
        """Make these edges, ascending, the real ones."""
        self.index, self.checksum = index, edge_sum(index)

    def choose(self, view: View) -> Tensor:
        """Return the edges that were chosen at the start.

        Raises:
            InputError: In evaluation, if the buffers changed, as by averaging.
        """
        if not (self.training or torch.compiler.is_compiling()):  # Compiled code cannot branch on values.
            refuse_spoiled(self.index, self.checksum, f"{view.name}: wiring.index")
        return self.index

    def leave(self, stay: Bool[Tensor, " candidates"]) -> None:
        """Keep the edges among the candidates that stay, by their new indices."""
        self.store((stay.cumsum(0) - 1)[self.index[stay[self.index]]])

    def refuse(self, saved: object, num_candidates: int, num_edges: int, what: str) -> None:
        """Refuse edges that are not k distinct ascending ones."""
        refuse_edges(saved, num_candidates, what, number=num_edges)


class ChangingEdges(StoredEdges):
    """Edges that change between steps, in number too: a mask of bytes, since averages cannot subtract booleans.

    Shapes:
        - ``real``: ``[num_candidates]``, uint8
    """

    buffer = "real", torch.uint8
    real: Tensor

    def __init__(self) -> None:
        super().__init__()
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
        self.real = unwrapped_tensor(index.new_zeros(view.num_candidates, dtype=torch.uint8).index_fill_(0, index, 1))
        self.checksum = unwrapped_tensor(edge_sum(index))

    def choose(self, view: View) -> Tensor:
        """Return the edges that are stored; synchronises with a device once per change.

        Raises:
            InputError: In evaluation, if the buffers changed, as by averaging; in an export.
        """
        if torch.compiler.is_exporting():
            raise InputError(
                f"{view.name}: the edges of {type(self).__name__} change in number, so it cannot be exported: "
                "compact(…) the model first"
            )
        state = version(self.real), self.training
        # Inference tensors have no version.
        if self._found is None or self._found[0] is not self.real or self._found[1] != state or state[0] == -1:
            index = torch.nonzero(self.real).flatten()
            if not self.training:
                refuse_spoiled(index, self.checksum, f"{view.name}: wiring.real")
            if transformed():  # Its wrappers must not outlive it.
                return index
            self._found = self.real, state, index
        return self._found[2]

    def leave(self, stay: Bool[Tensor, " candidates"]) -> None:
        """Keep the edges among those that stay."""
        self.real = self.real[stay]
        self.checksum = edge_sum(torch.nonzero(self.real).flatten())

    def refuse(self, saved: object, num_candidates: int, num_edges: int, what: str) -> None:
        """Refuse a mask that selects none, or of another number of candidates."""
        refuse_mask(saved, num_candidates, what)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_found": None}
