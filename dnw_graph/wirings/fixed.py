"""Given edges that never change."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from dnw_graph.errors import InputError
from dnw_graph.wirings.stored_edges import ConstantEdges
from dnw_graph.wirings.view import View


class Fixed(ConstantEdges):
    """Given edges, never changed; only they get a gradient.

    For a wiring that was found elsewhere or constructed. The edges are a persistent buffer: they are
    not a function of the weights.

    Args:
        edge_index: The edges, distinct and in any order: sources in row 0, targets in row 1; int64 or int32.

    Shapes:
        - ``index``: ``[num_edges]``, flat indices, ascending

    Raises:
        InputError: If it is not such a tensor. When a graph takes the wiring: if an edge occurs twice or is not a
            candidate of the graph, or if their number is not the graph's ``num_edges``.
    """

    def __init__(self, edge_index: Int[Tensor, "2 edges"]) -> None:
        super().__init__()
        if not isinstance(edge_index, Tensor) or edge_index.dtype not in (torch.int64, torch.int32):
            got = edge_index.dtype if isinstance(edge_index, Tensor) else type(edge_index).__name__
            raise InputError(f"edge_index must be a tensor of integers, such as torch.tensor(pairs).T; got {got}")
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise InputError(f"edge_index must be [2, edges], sources over targets; got {list(edge_index.shape)}")
        self.edge_index = edge_index.long()

    def own_num_edges(self, view: View) -> int:
        """Return the number of edges that were given."""
        return self.edge_index.size(1)

    def setup(self, view: View) -> None:
        """Find the edges among the candidates."""
        index = view.candidates.flat_index(self.edge_index.to(view.weight.device)).unique()
        if index.numel() != self.edge_index.size(1):
            raise InputError(f"{view.name}: {self.edge_index.size(1) - index.numel()} of the fixed edges are repeated")
        self.store(index)
