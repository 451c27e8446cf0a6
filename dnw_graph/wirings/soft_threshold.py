"""Soft threshold weight reparameterization."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.arguments import checked, require
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.view import View


class STR(Wiring):
    r"""Keeps the edges above a learned threshold (Kusupati et al. 2020).

    arXiv 2002.03231 and RAIVNLab/STR. The value of an edge is

    .. math:: \mathrm{sign}(w) \, \mathrm{relu}(|w| - \sigma(s)),

    where s is learned, one per graph (in the published code one per layer), with its own weight decay, and σ is the
    sigmoid. Training needs :func:`dnw_graph.attach`, which makes the optimiser step s. k cannot be set. The number of
    edges results from training (``num_real_edges``) and can be a budget for other rules (``distribution={…}``).
    Hallucinated weights get no gradient, but weight decay acts on them. In float32 the gradient of s is exactly 0 below
    s = -104, where only its weight decay changes it. On a GPU every forward pass synchronises to count the edges.

    Args:
        start: s₀. Published for ResNet-50 at 90%: -3200.
        weight_decay: Weight decay of s, whatever that of the other parameters is. Published: 2.25e-5.

    Shapes:
        - ``threshold``: scalar, s

    Raises:
        InputError: If the weight decay is negative.
    """

    gradient = "real"
    ignores_k = True

    @checked
    def __init__(self, start: float = -3200.0, weight_decay: float = 2.25e-5) -> None:
        super().__init__()
        require(weight_decay >= 0, "weight_decay", "0 or more", weight_decay)
        self.start, self.weight_decay = start, weight_decay
        self.threshold = nn.Parameter(torch.tensor(start))

    def setup(self, view: View) -> None:
        """Start at s₀, in the dtype of the weights."""
        self.threshold.data = torch.full_like(view.weight[0], self.start)

    def choose(self, view: View) -> Tensor:
        """Return the flat indices of the weights above the threshold."""
        self.largest(view, 1)  # Refuses weights that are not finite.
        return torch.nonzero(view.weight.detach().abs() > self.threshold.detach().sigmoid()).flatten()

    def values(self, weight: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Return the values of edges."""
        return weight.sign() * (weight.abs() - self.threshold.sigmoid()).relu()
