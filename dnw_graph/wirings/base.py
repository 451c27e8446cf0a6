"""The interface of a wiring: which candidates are real edges, and which get a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from dnw_graph.candidates import CandidateEdges
from dnw_graph.selection import Selector, new_flag


class Wiring(nn.Module):
    """The rule that chooses the real edges of a graph and says which candidates get a gradient.

    A subclass overrides :meth:`choose`, and where it needs to: :meth:`setup` to prepare state, :meth:`choose_to_train`
    if training uses other edges than evaluation or changes state, and :meth:`penalty` for a term of the loss. State
    that must survive a checkpoint is a persistent buffer, which the graph's ``state_dict`` holds under ``wiring.``.

    Attributes:
        updates_hallucinated: Whether hallucinated candidates get the gradient ⟨Z_u, ∂L/∂I_v⟩ (line 10 of the paper's
            Algorithm 1). If not, only the real edges of the forward pass get one. No gradient ever flows *through* a
            hallucinated edge.

    Examples:
        >>> from dnw_graph import NeuralGraph, Wiring
        >>> class StrongestPositive(Wiring):
        ...     updates_hallucinated = True
        ...
        ...     def choose(self, weight, num_edges, name):
        ...         return weight.topk(num_edges).indices.sort().values
        >>> graph = NeuralGraph(blocks=(3, 4, 2), num_edges=3, wiring=StrongestPositive())
        >>> bool((graph.edge_weight > 0).all())
        True
    """

    updates_hallucinated: ClassVar[bool]
    _flag: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._selector = Selector()
        # A buffer: it goes where the graph goes, and is a place that CUDA graphs may write to.
        self.register_buffer("_flag", new_flag(), persistent=False)
        self.register_state_dict_pre_hook(_read_flag)

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

    def largest(self, weight: Float[Tensor, " candidates"], k: int, name: str) -> Int[Tensor, " edges"]:
        """Return the flat indices of the k weights of largest |w|, ascending, ties to the lower index.

        What :func:`dnw_graph.selection.select_top_k` returns, in less time where the weights are those of the last call
        after a step of training. On a GPU nothing waits for the device: weights that are not finite are reported by
        :meth:`raise_non_finite`.

        Args:
            weight: Candidate weights.
            k: Number of edges, 1 … number of candidates.
            name: The graph's name, for messages.

        Raises:
            InputError: If k is out of range or, on a CPU, a weight is NaN or infinite.
        """
        if self._flag.device != weight.device:  # a rule for a graph that had been moved before
            self._flag = new_flag(weight.device)
        return self._selector.select(weight, k, name, self._flag)

    def raise_non_finite(self) -> None:
        """Report weights that :meth:`largest` met on a GPU, now that the host may wait for the device.

        The graph calls it when its edges are looked at, in evaluation, at the switch to it and before every
        ``state_dict``, so before a checkpoint is written.

        Raises:
            InputError: If weights were NaN or infinite. Again until edges are chosen anew.
        """
        self._selector.raise_non_finite(self._flag)

    def check_saved(self, saved: Mapping[str, Any], num_candidates: int, num_edges: int, name: str) -> None:
        """Refuse a saved state that the rule cannot go on with. Called before anything of a graph is loaded.

        Of a rule that keeps edges these are distinct candidates in ascending order, as many as the rule keeps.

        Args:
            saved: The rule's part of a state dict, by the names of its buffers; it may lack some.
            num_candidates: Number of candidates.
            num_edges: k.
            name: The graph's name, for messages.

        Raises:
            InputError: If it is no state of this rule for such a graph.
        """

    def forget_weights(self) -> None:
        """Have nothing left of the weights so far: no flag, no threshold. Called when they were replaced."""
        self._selector.forget(self._flag)

    def train(self, mode: bool = True) -> Wiring:
        """Switch between training and evaluation."""
        if self.training and not mode:
            self.raise_non_finite()
        super().train(mode)
        return self

    def penalty(self, weight: Float[Tensor, " candidates"]) -> Float[Tensor, ""] | None:
        """Return what the rule adds to the loss, or None; see :func:`dnw_graph.wiring_penalty`."""
        return None

    def set_num_steps(self, num_steps: int) -> None:
        """Tell a rule with a schedule how many steps training has; other rules do not care."""

    def __getstate__(self) -> dict[str, Any]:
        self.raise_non_finite()
        return self.__dict__


def _read_flag(wiring: Wiring, *_: Any) -> None:
    """Keep weights that are not finite out of checkpoints."""
    wiring.raise_non_finite()
