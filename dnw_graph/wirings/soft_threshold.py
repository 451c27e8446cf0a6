"""Soft threshold weight reparameterization."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.arguments import checked, require
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.view import View


class STR(Wiring):
    r"""Real edges are those above a threshold that is learned (Kusupati et al. 2020).

    arXiv 2002.03231 and RAIVNLab/STR. An edge computes with

    .. math:: \mathrm{sign}(w) \, \mathrm{relu}(|w| - \sigma(s)),

    where s is learned, one per graph, with a weight decay of its own, and σ is the sigmoid. k is not set: it results,
    as ``num_real_edges``, and can be given to other rules as a budget (``distribution={…}``). Hallucinated weights get
    no gradient, weight decay acts on them. In float32 the gradient of s is exactly 0 below s = -104, where only its
    decay moves it. On a GPU every forward pass synchronises with the device, to learn how many edges there are.

    Args:
        start: s₀. Published for ResNet-50 at 90%: -3200.
        weight_decay: Decay of s, which :func:`dnw_graph.attach` gives to the optimiser. Published: 2.25e-5.

    Shapes:
        - ``threshold``: scalar, s

    Raises:
        InputError: If the decay is negative.
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
        """Start at s₀, in the type of the weights."""
        self.threshold.data = torch.full_like(view.weight[0], self.start)

    def choose(self, view: View) -> Tensor:
        """Return the flat indices of what is above the threshold."""
        self.largest(view, 1)  # refuses weights that are not finite
        return torch.nonzero(view.weight.detach().abs() > self.threshold.detach().sigmoid()).flatten()

    def values(self, weight: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Return what edges compute with."""
        return weight.sign() * (weight.abs() - self.threshold.sigmoid()).relu()
