"""Sparse training of any network: the rules of the package applied to the weights of layers."""

from __future__ import annotations

from dnw_graph.sparse_layers.access import to_data, weight_graphs
from dnw_graph.sparse_layers.apply import sparsify
from dnw_graph.sparse_layers.layers import register_layer
from dnw_graph.sparse_layers.optimizer_state import load_optimizer_state
from dnw_graph.sparse_layers.state import dense_state_dict
from dnw_graph.sparse_layers.table import SparsityRow, SparsityTable
from dnw_graph.sparse_layers.to_dense import densify
from dnw_graph.sparse_layers.weight_graph import WeightGraph

__all__ = [
    "SparsityRow",
    "SparsityTable",
    "WeightGraph",
    "dense_state_dict",
    "densify",
    "load_optimizer_state",
    "register_layer",
    "sparsify",
    "to_data",
    "weight_graphs",
]
