"""Cost of a model, and its live nodes."""

from dnw_graph.analysis.cost import NORMS, Cost, CostRow, cost, live_nodes, neural_graphs

__all__ = ["NORMS", "Cost", "CostRow", "cost", "live_nodes", "neural_graphs"]
