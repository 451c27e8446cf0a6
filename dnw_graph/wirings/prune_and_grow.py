"""The base of rules that prune and grow: k random edges at first, some of which are exchanged at intervals."""

from __future__ import annotations

import math
import warnings
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dnw_graph.arguments import require
from dnw_graph.selection import select_top_k
from dnw_graph.wirings.schedule import Schedule
from dnw_graph.wirings.stored_edges import ChangingEdges
from dnw_graph.wirings.view import View


class PruneAndGrow(ChangingEdges):
    """Starts with k random edges, drawn by PyTorch's generator; hallucinated weights are zero and are not trained.

    After a step of a round the weakest edges are dropped, and as many grow. A subclass says by which :meth:`scores`
    they grow; those of RigL, the gradients of all candidates, are the default. No round follows the last step, if the
    number of steps is known: edges that grow there would never be trained.

    Attributes:
        grows_by_gradient: Whether :meth:`scores` reads the gradients of all candidates.
        regrown_are_new: Whether an edge that is dropped and grown in the same round also starts from zero.
        skip_update: Whether the candidates are not updated in a step with a round.

    Args:
        fraction: Share of k that a round exchanges, rounded down.
        every: Steps between rounds. Default: the steps of an epoch, which ``attach`` or the callback must know.

    Raises:
        InputError: If ``every`` is below 1.
    """

    trained = "real"
    grows_by_gradient: ClassVar[bool] = True
    regrown_are_new: ClassVar[bool] = False
    skip_update = False

    def __init__(self, fraction: Schedule, every: int | None) -> None:
        super().__init__()
        require(every is None or every >= 1, "every", "an integer >= 1", every)
        self.fraction, self.every = fraction, every

    def setup(self, view: View) -> None:
        """Draw k edges, and set all other weights to zero."""
        self.store(view, select_top_k(view.random_scores(), view.k, view.name))
        view.weight.mul_(self.real)

    def setup_loaded(self, view: View) -> None:
        """Keep the k edges of largest |w|, and set all other weights to zero."""
        self.store(view, self.largest(view, view.k))
        view.weight.mul_(self.real)

    def refuse_unknown_numbers(self, view: View) -> None:
        """Refuse rounds of epochs of unknown length, too."""
        super().refuse_unknown_numbers(view)
        _ = self.every or view.steps_per_epoch

    def is_round(self, view: View, step: int) -> bool:
        """Return whether a round follows a step, counted from 1."""
        return step > 0 and step != self.num_steps and step % (self.every or view.steps_per_epoch) == 0

    def number(self, view: View, step: int) -> int:
        """Return how many edges are dropped after a step, counted from 1."""
        return math.floor(self.share(view, step, view.k)) if self.is_round(view, step) else 0

    def share(self, view: View, step: int, edges: int) -> float:
        """Return the fraction after a step of some edges, without rounding errors: 0.29 of 100 is 29."""
        return round(self.fraction.at(view, after=step) * edges, 6)

    def scores(self, view: View) -> Float[Tensor, " candidates"]:
        """Return a score per candidate; edges of largest |score| are grown."""
        return view.gradient

    def needs_gradient(self, view: View) -> bool:
        """Return whether the next step has a round, and edges are grown by their gradient."""
        return self.grows_by_gradient and self.number(view, view.step + 1) > 0

    def skips_update(self, view: View) -> bool:
        """Return whether the next step has a round, if that skips the update."""
        return self.skip_update and self.number(view, view.step + 1) > 0

    def after_step(self, view: View) -> None:
        """Do a round if it is time."""
        if number := self.number(view, view.step):
            scores = self.scores(view)
            if scores.isfinite().all():
                self.exchange(view, number, number, scores)
            else:  # Under a GradScaler .grad can be finite all the same, so that it does not skip the step.
                what = f"{view.name}, step {view.step}: the gradient of some candidates is NaN or infinite"
                warnings.warn(f"{what}: no edge is exchanged", stacklevel=2)

    def exchange(self, view: View, dropped: int, grown: int, scores: Float[Tensor, " candidates"]) -> None:
        """Drop the real edges of least |w|, and grow others by the largest |score| among all that are not kept.

        Grown edges start with weight zero. So does the optimiser state of all candidates that are not trained.

        Args:
            view: The candidates.
            dropped: Number of edges to drop.
            grown: Number of edges to grow.
            scores: A score per candidate.
        """
        before = self.mask
        edges = self.choose(view)
        kept = top(view, edges, edges.numel() - dropped, view.weight)
        others = torch.ones_like(before).index_fill_(0, kept, False).nonzero().flatten()
        self.store(view, torch.cat([kept, top(view, others, grown, scores)]))
        stay = torch.zeros_like(before).index_fill_(0, kept, True) if self.regrown_are_new else before & self.mask
        view.clear(~stay, state=self.trained == "real")


def top(
    view: View, among: Int[Tensor, " some"], number: int, scores: Float[Tensor, " candidates"]
) -> Int[Tensor, " chosen"]:
    """Return, of some candidates, those of largest |score|, ties to the lower index."""
    return among[select_top_k(scores[among], number, view.name)] if number else among[:0]
