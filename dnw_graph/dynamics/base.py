"""The interface of a dynamics: how states follow from one another."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.candidates import CandidateEdges
from dnw_graph.node_functions import NodeFunction
from dnw_graph.propagation import Propagate


class Dynamics(nn.Module):
    """How the states of all nodes follow from the inputs, given propagation and node functions.

    One object serves one graph: it owns the graph's node functions.
    """

    def setup(
        self,
        sizes: Sequence[int],
        candidates: CandidateEdges | None,
        node_function: NodeFunction,
        stride: int,
        input_function: bool,
        output_function: bool,
    ) -> CandidateEdges:
        """Build the node functions for groups of nodes and return the candidate edges.

        Args:
            sizes: Number of nodes of each group; the first group are the inputs, the last the outputs.
            candidates: The candidates that the user asks for, or None for all that the dynamics allows.
            node_function: What a node does with its input.
            stride: Stride of the inputs' node function.
            input_function: Whether f_θ is applied at the input nodes.
            output_function: Whether f_θ is applied at the output nodes.
        """
        raise NotImplementedError

    def functions(self) -> list[tuple[nn.Module, range]]:
        """Return the node functions, each with the nodes whose function it is."""
        raise NotImplementedError

    def forward(
        self, x: Float[Tensor, "batch inputs *space"], propagate: Propagate
    ) -> Float[Tensor, "batch outputs *space2"]:
        """Return the states of the output nodes.

        Args:
            x: What flows into the input nodes.
            propagate: ``propagate(number, z)``, see :data:`dnw_graph.propagation.Propagate`.
        """
        raise NotImplementedError
