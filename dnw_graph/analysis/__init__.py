"""Cost of a model, and its live nodes."""

from dnw_graph.analysis.cost import NORMS, Cost, CostRow, cost, live_nodes, neural_graphs
from dnw_graph.analysis.silent import SilentBlock, largest_weights, silent_blocks, silent_nodes

__all__ = [
    "NORMS",
    "Cost",
    "CostRow",
    "SilentBlock",
    "cost",
    "largest_weights",
    "live_nodes",
    "neural_graphs",
    "silent_blocks",
    "silent_nodes",
]
