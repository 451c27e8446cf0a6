"""Exact selection of the candidates with the largest magnitude."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dnw_graph.errors import InputError

# Below this many candidates a sampled guess saves nothing; above it, one weight in _SAMPLE_STRIDE is sampled.
_SAMPLE_FROM = 1 << 16
_SAMPLE_STRIDE = 61


def select_top_k(weight: Float[Tensor, " candidates"], k: int, name: str = "graph") -> Int[Tensor, " edges"]:
    """Return the flat indices of the k weights of largest |w|, ascending.

    Line 5 of the paper's Algorithm 1: τ is the k-th largest magnitude, every candidate above τ is chosen, and among
    those equal to τ the ones with the lower index, so that exactly k are chosen on every device.

    Args:
        weight: Candidate weights.
        k: Number of edges, 1 … number of candidates.
        name: Name of the graph, for messages.

    Raises:
        InputError: If k is out of range or a weight is NaN or infinite.
    """
    if not 1 <= k <= weight.numel():
        raise InputError(f"{name}: cannot choose {k} edges among {weight.numel()} candidates")
    magnitude = weight.detach().abs()
    # NaN and infinity both survive max(); nothing finite turns into them.
    if not torch.isfinite(magnitude.max()):
        bad = int((~torch.isfinite(magnitude)).sum())
        raise InputError(
            f"{name}: {bad} of {weight.numel()} candidate weights are NaN or infinite; "
            "lower the learning rate or check the inputs of the loss"
        )
    if k == weight.numel():
        return torch.arange(k, device=weight.device)
    near = _nearly_largest(magnitude, k)
    if near is not None:
        magnitude = magnitude[near]
    threshold = torch.topk(magnitude, k, sorted=False).values.min()
    chosen = torch.nonzero(magnitude >= threshold).flatten()
    surplus = chosen.numel() - k
    if surplus:
        keep = torch.ones_like(chosen, dtype=torch.bool)
        keep[torch.nonzero(magnitude[chosen] == threshold).flatten()[-surplus:]] = False
        chosen = chosen[keep]
    return chosen if near is None else near[chosen]


def _nearly_largest(magnitude: Tensor, k: int) -> Tensor | None:
    """Return the indices, ascending, of somewhat more than the k largest values; None where all have to be ranked."""
    if magnitude.numel() < _SAMPLE_FROM or magnitude.device.type != "cpu":
        return None
    # A sample guesses a value a little under the threshold. If at least k values reach it, the k-th largest is among
    # those few; if not, the guess was too high and everything is ranked.
    sample = magnitude[::_SAMPLE_STRIDE]
    expected = k * sample.numel() / magnitude.numel()
    rank = int(expected + 4 * expected**0.5) + 1
    if rank >= sample.numel():
        return None
    guess = torch.topk(sample, rank, sorted=False).values.min()
    # NumPy finds them several times faster than torch.nonzero.
    near = torch.from_numpy(np.flatnonzero((magnitude >= guess).numpy()))
    return near if near.numel() >= k else None
