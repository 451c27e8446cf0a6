"""The interface of a wiring: which candidates are real edges, and which get a gradient."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from dnw_graph.candidates import CandidateEdges


class Wiring(nn.Module):
    """The rule that chooses the real edges of a graph and says which candidates get a gradient.

    A subclass overrides :meth:`choose`, and :meth:`setup` if it keeps state. State that must survive a checkpoint is a
    persistent buffer, which the graph's ``state_dict`` holds under ``wiring.``.

    Attributes:
        updates_hallucinated: Whether hallucinated candidates get the gradient ⟨Z_u, ∂L/∂I_v⟩ (line 10 of the paper's
            Algorithm 1). If not, only the real edges of the forward pass get one. No gradient ever flows *through* a
            hallucinated edge.

    Example:
        >>> class StrongestPositive(Wiring):
        ...     updates_hallucinated = True
        ...
        ...     def choose(self, weight, num_edges, name):
        ...         return weight.topk(num_edges).indices.sort().values
    """

    updates_hallucinated: ClassVar[bool]

    def setup(self, candidates: CandidateEdges, num_edges: int, name: str) -> None:
        """Prepare state for a graph. Called whenever the candidate weights have been drawn anew.

        Args:
            candidates: The graph's candidates with their initial weights.
            num_edges: k, already checked against the number of candidates.
            name: The graph's name, for messages.
        """

    def choose(self, weight: Float[Tensor, " candidates"], num_edges: int, name: str) -> Int[Tensor, " edges"]:
        """Return the flat indices of the real edges, ascending.

        Called once per forward pass in training, and in evaluation when the weights have changed. A recomputation in
        the backward pass takes the edges of the last forward pass, so a rule that chooses anew without a change of the
        weights must not be checkpointed over several forward passes.

        Args:
            weight: Candidate weights.
            num_edges: k.
            name: The graph's name, for messages.
        """
        raise NotImplementedError
