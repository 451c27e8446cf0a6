"""Pictures of wirings, recordings of how they change over time, and the export to networkx.

matplotlib and networkx come with the extra ``dnw-graph[train]`` and are imported only when needed.
"""

from dnw_graph.visualize.evolution import animate, plot_evolution
from dnw_graph.visualize.graphs import plot, plot_change
from dnw_graph.visualize.layouts import to_networkx
from dnw_graph.visualize.matrices import plot_adjacency, plot_layers
from dnw_graph.visualize.page import save_page
from dnw_graph.visualize.recorded_graph import QUANTILES, Moment, RecordedGraph
from dnw_graph.visualize.recording import Recording
from dnw_graph.visualize.training_curves import plot_training

__all__ = [
    "QUANTILES",
    "Moment",
    "RecordedGraph",
    "Recording",
    "animate",
    "plot",
    "plot_adjacency",
    "plot_change",
    "plot_evolution",
    "plot_layers",
    "plot_training",
    "save_page",
    "to_networkx",
]
