"""Silent nodes: nodes without incoming real edges, whose norms make gradients explode."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor, nn

from dnw_graph.analysis.cost import neural_graphs
from dnw_graph.arguments import checked


@dataclass(frozen=True)
class SilentBlock:
    """A block most of whose outputs are silent.

    Attributes:
        graph: Name of the graph.
        block: Number of the block, from 0.
        silent: Number of its silent nodes.
        size: Number of its nodes.
    """

    graph: str
    block: int
    silent: int
    size: int

    def __str__(self) -> str:
        return f"{self.silent} of the {self.size} nodes of block {self.block} of {self.graph}"


@checked
def silent_nodes(model: nn.Module) -> dict[str, Bool[Tensor, " nodes"]]:
    """Return, by graph name, the nodes without incoming real edges, except inputs whose states the dynamics sets.

    The map of such a node has no variance, so its norm multiplies gradients by 1/√eps.
    """
    return {name: graph.silent_nodes() for name, graph in neural_graphs(model).items()}


@checked
def silent_blocks(model: nn.Module) -> list[SilentBlock]:
    """Return the blocks in which more than half of the outputs are silent, graph by graph."""
    found = []
    for name, graph in neural_graphs(model).items():
        silent = graph.silent_nodes()
        for number, nodes in enumerate(graph.nodes.block_ranges):
            count = int(silent[nodes.start : nodes.stop].sum())
            if 2 * count > len(nodes):
                found.append(SilentBlock(name, number, count, len(nodes)))
    return found


@checked
def largest_weights(model: nn.Module) -> dict[str, float]:
    """Return, by graph name, the largest magnitude of a candidate weight."""
    return {name: float(graph.candidates.weight.detach().abs().max()) for name, graph in neural_graphs(model).items()}
