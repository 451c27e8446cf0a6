"""Alternating compressed and dense training."""

from __future__ import annotations

from collections.abc import Sequence

from dnw_graph.arguments import checked, require
from dnw_graph.wirings.schedule import MOMENT, is_moment, moment
from dnw_graph.wirings.stored_edges import ChangingEdges
from dnw_graph.wirings.view import View

IMAGENET = (*(epoch / 100 for epoch in range(10, 80, 5)), 0.85)


class ACDC(ChangingEdges):
    r"""Alternates between all edges and the k strongest (Peste et al. 2021).

    arXiv 2106.12379 and IST-DASLab/ACDC. Training starts dense: all candidates are real. A compressed phase keeps the k
    of largest |w| until it ends; the other weights are zero and are not trained. Each dense phase starts with zero
    momentum in all parameters of the optimiser. The published figures rank all layers together
    (``distribution="global"``). After step t the number of real edges is

    .. math:: |E| = k \text{ if } |\{s : t_s \le t\}| \text{ is odd, else } n,

    with the switches t_s and n candidates. The published code counts t in epochs.

    Args:
        switches: The ends of the phases, all as steps or all as fractions of training. The first phase is dense; the
            number of switches is odd, so that training ends with k edges. Default: the paper's for 100 epochs of
            ImageNet: dense until epoch 10, compressed until 15, …, dense from 75 to 85, compressed to the end.

    Shapes:
        - ``real``: ``[num_candidates]``, uint8

    Raises:
        InputError: If the switches are not ascending, their number is even, or one is neither a step nor a fraction.
    """

    trained = "real"

    @checked
    def __init__(self, switches: Sequence[int | float] = IMAGENET) -> None:
        super().__init__()
        ascending = len(switches) % 2 == 1 and list(switches) == sorted(set(switches)) and switches[0] > 0
        require(ascending, "switches", "an odd number of ascending moments", switches)
        require(all(map(is_moment, switches)), "switches", f"moments, each {MOMENT}", switches)
        require(len(set(map(type, switches))) == 1, "switches", "all steps or all fractions", switches)
        self.switches = tuple(switches)

    def refuse_unknown_numbers(self, view: View) -> None:
        """Refuse switches in fractions of a training of unknown length."""
        super().refuse_unknown_numbers(view)
        moment(view, self.switches[0])

    def after_step(self, view: View) -> None:
        """Begin a phase if it is time."""
        compressed = sum(moment(view, switch) <= view.step for switch in self.switches) % 2
        number = view.k if compressed else view.num_candidates
        if number == self.choose(view).numel():
            return
        self.store(view, self.largest(view, number))
        if compressed:
            view.weight.mul_(self.real)
        else:
            view.reset_momentum()
