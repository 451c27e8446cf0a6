"""The message passing of a neural graph as a PyG module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dnw_graph._compat import import_pyg

import_pyg()

from torch_geometric.nn import MessagePassing  # noqa: E402
from torch_geometric.utils import spmm  # noqa: E402


class WeightedSum(MessagePassing):
    r"""The message passing of a neural graph, :math:`I_v = \sum_{(u,v) \in E} w_{uv} Z_u`.

    Shapes:
        - states: node-major ``[sources, features]``, for images ``features = batch · height · width``
        - edges: ``edge_index [2, k]`` with ``edge_weight [k]``, or a sparse (targets × sources) adjacency
        - output: ``[targets, features]``
    """

    def __init__(self) -> None:
        super().__init__(aggr="sum", node_dim=0)

    def forward(
        self, z: Tensor, edge_index: Any, edge_weight: Tensor | None = None, num_targets: int | None = None
    ) -> Tensor:
        """Send the states over the edges."""
        size = None if num_targets is None else (z.size(0), num_targets)
        return self.propagate(edge_index, x=(z, None), edge_weight=edge_weight, size=size)

    def message(self, x_j: Tensor, edge_weight: Tensor) -> Tensor:
        """Return w_uv Z_u for every edge."""
        return edge_weight.view(-1, 1) * x_j

    def message_and_aggregate(self, adj_t: Any, x: tuple[Tensor, None]) -> Tensor:
        """Return the sparse product of the adjacency with the states."""
        if isinstance(adj_t, Tensor) and not adj_t.is_cuda:
            # With a reduction, PyTorch uses its own kernel, two to three times as fast as the library that it uses
            # otherwise.
            return torch.sparse.mm(adj_t, x[0], "sum")
        return spmm(adj_t, x[0], reduce=self.aggr)
