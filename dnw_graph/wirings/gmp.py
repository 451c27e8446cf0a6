"""Gradual magnitude pruning."""

from __future__ import annotations

from dnw_graph.arguments import checked, require
from dnw_graph.wirings.schedule import Schedule, moment
from dnw_graph.wirings.stored_edges import ChangingEdges
from dnw_graph.wirings.view import View


class GMP(ChangingEdges):
    r"""Starts complete and removes the weakest edges for good, fast at first (Zhu and Gupta 2017).

    arXiv 1710.01878. From step t₀ to t₁, every ΔT steps, the number of real edges falls to

    .. math:: n - (n - k) \left(1 - \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3\right),

    rounded to the nearest, by |w|. What is removed never comes back; its weight and optimiser state are zero, and it is
    not trained. (In STR's code, whose baseline this is, weight decay and momentum can bring it back.) One ranking per
    graph, or of all layers with ``distribution="global"``.

    Args:
        begin: t₀, a step or a fraction of training.
        until: t₁, a step or a fraction of training.
        every: ΔT, steps between removals.

    Shapes:
        - ``real``: ``[num_candidates]``, uint8

    Raises:
        InputError: If a moment is none, or ``every`` no integer from 1 up.
    """

    trained = "real"

    @checked
    def __init__(self, begin: int | float = 0.0, until: int | float = 0.75, every: int = 100) -> None:
        super().__init__()
        require(every >= 1, "every", "an integer from 1 up", every)
        self.removal = Schedule(0.0, 1.0, begin, until, "cubic")
        self.begin, self.until, self.every = begin, until, every

    def after_step(self, view: View) -> None:
        """Remove edges if it is time."""
        since = view.step - moment(view, self.begin)
        if since < 0 or (since % self.every and view.step < moment(view, self.until)):
            return
        keep = round(view.num_candidates - (view.num_candidates - view.k) * self.removal.at(view, after=True))
        edges = self.choose(view)
        if keep < edges.numel():
            self.store(view, self.largest(view, keep, among=edges))
            view.clear(~self.mask)
