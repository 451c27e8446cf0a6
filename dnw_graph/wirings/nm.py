"""N:M sparsity with sparse-refined straight-through gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dnw_graph.arguments import checked, require
from dnw_graph.selection import largest_along
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.view import View


class NM(Wiring):
    r"""Keeps, of every m consecutive inputs of a target, the n of largest |w| (Zhou et al. 2021, SR-STE).

    arXiv 2102.04010 and aojunzz/NM-sparsity. A group consists of input channels at one position of the kernel; a
    shorter last group keeps min(n, its size). This determines k; any other k is refused. Every candidate gets a
    gradient. Hallucinated ones also get λw, the gradient of :math:`\tfrac{\lambda}{2} \sum w^2` over them: add
    :func:`dnw_graph.wiring_penalty` to the loss. The published code adds λw to the gradient itself.
    With λ = 0 this is ``"dnw"`` within every group. :func:`~dnw_graph.sparse_layers.densify` can turn 2 of 4 into
    tensors for the sparse kernels of a GPU.

    Args:
        n: Real edges of a group.
        m: Size of a group.
        strength: λ.

    Raises:
        InputError: If not 1 ≤ n ≤ m, λ is negative, or another k was requested.
    """

    decides_k = True

    @checked
    def __init__(self, n: int = 2, m: int = 4, strength: float = 2e-4) -> None:
        super().__init__()
        require(1 <= n <= m, "n", f"an integer in 1 … m = {m}", n)
        require(strength >= 0, "strength", "0 or more", strength)
        self.n, self.m, self.strength = n, m, strength

    def own_num_edges(self, view: View) -> int:
        """Return the number of edges that the groups determine."""
        blocks = zip(view.candidates.blocks, view.candidates.places, strict=True)
        sizes = [(len(block.targets) * places, len(block.sources) // places) for block, places in blocks]
        return sum(rows * (c // self.m * self.n + min(self.n, c % self.m)) for rows, c in sizes)

    def choose(self, view: View) -> Tensor:
        """Return the n strongest of every group, ties to the lower index."""
        self.largest(view, 1)  # Refuses weights that are not finite.
        return torch.nonzero(self._real(view)).flatten()

    def _real(self, view: View) -> Tensor:
        parts = []
        for block, places in zip(view.candidates.blocks, view.candidates.places, strict=True):
            channels = len(block.sources) // places
            size = view.weight.detach()[block.flat].abs().view(-1, channels, places)
            groups = F.pad(size, (0, 0, 0, -channels % self.m), value=-1.0).unflatten(1, (-1, self.m))
            parts.append(largest_along(groups, self.n, dim=2).flatten(1, 2)[:, :channels].flatten())
        return torch.cat(parts)

    def penalty(self, view: View) -> Float[Tensor, ""] | None:
        """Return the penalty on hallucinated weights."""
        if not self.strength:
            return None
        return self.strength / 2 * (view.weight.square() * ~self._real(view)).sum()
