"""The interface of a wiring: which candidates are real edges, and which get a gradient."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from dnw_graph.candidates import CandidateEdges


class Wiring(nn.Module):
    """The rule that chooses the real edges of a graph and says which candidates get a gradient.

    A subclass overrides :meth:`choose`, and where it needs to: :meth:`setup` to prepare state, :meth:`choose_to_train`
    if training uses other edges than evaluation or changes state, and :meth:`penalty` for a term of the loss. State
    that must survive a checkpoint is a persistent buffer, which the graph's ``state_dict`` holds under ``wiring.``.

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
        """Return the flat indices of the real edges, ascending; a look, which changes no state.

        Called in evaluation when the weights have changed, and whenever somebody asks for the wiring. A rule may choose
        another number of edges than k, for example more of them early in training.

        Args:
            weight: Candidate weights.
            num_edges: k.
            name: The graph's name, for messages.
        """
        raise NotImplementedError

    def choose_to_train(self, weight: Float[Tensor, " candidates"], num_edges: int, name: str) -> Int[Tensor, " edges"]:
        """Return the flat indices of the real edges of a training step, ascending; may change state.

        Called once per forward pass in training; by default it is :meth:`choose`. A recomputation in the backward pass
        takes the edges of the last forward pass, so a rule that chooses anew without a change of the weights must not
        be checkpointed over several forward passes.
        """
        return self.choose(weight, num_edges, name)

    def penalty(self, weight: Float[Tensor, " candidates"]) -> Float[Tensor, ""] | None:
        """Return what the rule adds to the loss, or None; see :func:`dnw_graph.wiring_penalty`."""
        return None

    def set_num_steps(self, num_steps: int) -> None:
        """Tell a rule with a schedule how many steps training has; other rules do not care."""
