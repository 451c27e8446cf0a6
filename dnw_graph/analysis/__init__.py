"""What a model costs, and which of its nodes are of use."""

from dnw_graph.analysis.cost import NORMS, Cost, CostRow, cost, live_nodes, neural_graphs

__all__ = ["NORMS", "Cost", "CostRow", "cost", "live_nodes", "neural_graphs"]
