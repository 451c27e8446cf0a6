"""Targeted weight dropout, unconstrained and regular."""

from __future__ import annotations

import torch
from torch import Tensor

from dnw_graph._compat import not_compiled
from dnw_graph.arguments import checked
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.selection import largest_along
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.schedule import Changing, Schedule, share_over_time
from dnw_graph.wirings.view import View

VARIANTS = ("unconstrained", "regular")


class TargetedDropout(Wiring):
    r"""Drops weak edges at random in training, and prunes them in evaluation (Gomez et al. 2019).

    TD in Section 3.3 and Appendix B of the paper, after arXiv 1905.13678. With n candidates and
    :math:`\gamma = 1 - k / n`, the *targets* are the γ n candidates of smallest |w|. In training each target is dropped
    with probability ρ; in evaluation all are. Other edges keep their weight, without a factor 1 / (1 - ρ); dropped ones
    get no gradient in that step.

    - ``"unconstrained"``: the targets are the weakest of the whole graph; k edges stay.
    - ``"regular"``: the targets are the ⌊γ · fan-in⌋ weakest edges into each node, so that every node keeps some. In
      total somewhat more than k edges stay.

    Masks are a function of (seed, step, name of the graph). With :func:`dnw_graph.attach` they are the same on every
    rank and in all forward passes of an optimiser step. A constant ρ works without it: every forward pass in training
    then counts as a step, and graphs of one name have different seeds. Every training step synchronises with the
    device, to count the edges that stay.

    Args:
        rho: ρ: a number in 0 … 1, ``"gamma"`` for ρ = γ, or a :class:`Schedule`.
        variant: ``"unconstrained"`` or ``"regular"``.

    Raises:
        InputError: If ρ is not a probability or the variant is unknown. For the regular variant: if the target nodes of
            two blocks of candidates overlap without being the same.
    """

    gradient = "real"
    counts_steps = True

    @checked
    def __init__(self, rho: Changing | str = 0.95, variant: str = "unconstrained") -> None:
        super().__init__()
        if isinstance(rho, str) and rho != "gamma":
            raise InputError(f"rho must be a number in 0 … 1, 'gamma' or a schedule; got {rho!r}")
        self.rho = rho if isinstance(rho, str) else share_over_time("rho", rho)
        if variant not in VARIANTS:
            raise unknown_name("variant of targeted dropout", variant, VARIANTS)
        self.variant = variant

    def setup(self, view: View) -> None:
        """Group the candidates by target."""
        self.groups = view.candidates.by_target() if self.variant == "regular" else []

    def choose(self, view: View) -> Tensor:
        """Return the edges that stay after pruning: all but the targets."""
        if self.variant == "unconstrained":
            return self.largest(view, view.k)
        self.largest(view, 1)  # refuses weights that are not finite
        size = view.weight.detach().abs()
        stays = torch.zeros_like(size, dtype=torch.bool)
        for blocks in self.groups:
            into = torch.cat([view.candidates.block_weight(block, size) for block in blocks], dim=1)
            fan_in = into.size(1)
            dropped = (view.num_candidates - view.k) * fan_in // view.num_candidates
            kept = largest_along(into, fan_in - dropped, dim=1)
            for block, part in zip(blocks, kept.split([len(block.sources) for block in blocks], dim=1), strict=True):
                stays[block.flat] = part.flatten()
        return torch.nonzero(stays).flatten()

    @not_compiled  # It would be recompiled in every step.
    def choose_to_train(self, view: View) -> Tensor:
        """Return the edges of this step: the strongest, and the targets that are not dropped."""
        rho = self.rho.at(view) if isinstance(self.rho, Schedule) else 1 - view.k / view.num_candidates
        device = view.weight.device
        stays = torch.rand(view.num_candidates, generator=view.generator(), dtype=torch.float32, device=device) >= rho
        stays[self.choose(view)] = True
        if not self.needs_steps and view.graph.updates is None:
            self.step += 1
        return torch.nonzero(stays).flatten()
