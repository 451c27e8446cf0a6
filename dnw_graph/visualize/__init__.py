"""Pictures of wirings, recordings of how they change over time, and the way to networkx.

matplotlib and networkx come with the extra ``dnw-graph[train]`` and are imported only where they are needed.
"""

from dnw_graph.visualize.pictures import plot, plot_adjacency, plot_change, to_networkx
from dnw_graph.visualize.recording import QUANTILES, Moment, RecordedGraph, Recording

__all__ = [
    "QUANTILES",
    "Moment",
    "RecordedGraph",
    "Recording",
    "plot",
    "plot_adjacency",
    "plot_change",
    "to_networkx",
]
