"""Gradual magnitude pruning."""

from __future__ import annotations

from dnw_graph.arguments import checked, require
from dnw_graph.wirings.schedule import Schedule, moment
from dnw_graph.wirings.stored_edges import ChangingEdges
from dnw_graph.wirings.view import View


class GMP(ChangingEdges):
    r"""Starts with all candidates and removes the weakest edges for good, fast at first (Zhu and Gupta 2017).

    arXiv 1710.01878. From step t₀ to t₁, every ΔT steps, the edges of smallest |w| are removed, until the number of
    real edges is

    .. math:: n - (n - k) \left(1 - \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3\right),

    rounded to the nearest integer. Removed edges stay removed: their weight and optimiser state are zero, and they are
    not trained. (In the code of STR, which has GMP as a baseline, weight decay and momentum can revive them.) Edges are
    ranked per graph, or over all layers with ``distribution="global"``.

    Args:
        begin: t₀, a step or a fraction of training.
        until: t₁, a step or a fraction of training.
        every: ΔT, steps between removals.

    Shapes:
        - ``real``: ``[num_candidates]``, uint8

    Raises:
        InputError: If ``begin`` or ``until`` is neither a step nor a fraction, or ``every`` is below 1.
    """

    trained = "real"

    @checked
    def __init__(self, begin: int | float = 0.0, until: int | float = 0.75, every: int = 100) -> None:
        super().__init__()
        require(every >= 1, "every", "an integer >= 1", every)
        self.removal = Schedule(0.0, 1.0, begin, until, "cubic")
        self.begin, self.until, self.every = begin, until, every

    def after_step(self, view: View) -> None:
        """Remove edges if it is time."""
        since = view.step - moment(view, self.begin)
        if since < 0 or (since % self.every and view.step < moment(view, self.until)):
            return
        keep = round(view.num_candidates - (view.num_candidates - view.k) * self.removal.at(view, after=view.step))
        edges = self.choose(view)
        if keep < edges.numel():
            self.store(view, self.largest(view, keep, among=edges))
            view.clear(~self.mask)
