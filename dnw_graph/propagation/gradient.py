r"""The gradient of Figure 3 of the paper: *to* hallucinated edges, not *through* them.

The forward pass computes with the real edges E alone (Equation 1), so states get their gradient through them only:

.. math:: I_v = \sum_{(u,v) \in E} w_{uv} Z_u

.. math:: \frac{\partial L}{\partial Z_u} = \sum_{(u,v) \in E} w_{uv} \frac{\partial L}{\partial I_v}

Every candidate (u, v), real or not, gets the gradient that it would get if it were real (line 10 of Algorithm 1):

.. math:: \frac{\partial L}{\partial w_{uv}} := \left\langle Z_u, \frac{\partial L}{\partial I_v} \right\rangle

A rule may restrict the gradient in ``.grad`` to some candidates, and request that of all candidates in a separate
buffer, the *probe*: a leaf of zeros whose own ``.grad`` accumulates it over backward passes.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dnw_graph.propagation.propagate import RealEdges


def candidate_weights(edges: RealEdges) -> Float[Tensor, " candidates"]:
    """Return the values of all candidates; ``.grad`` gets the part of their gradient that the rule requests."""
    if edges.learning is None and edges.probe is None:
        return edges.weight
    return _ToCandidates.apply(edges.weight, edges.probe, edges, False)


def unrestricted_weights(edges: RealEdges) -> Float[Tensor, " candidates"]:
    """Return the same as :func:`candidate_weights`, for products that only compute gradients of ``edges.sampled``."""
    return candidate_weights(edges) if edges.sampled is None else edges.weight


def real_weights(edges: RealEdges) -> Float[Tensor, " candidates"]:
    """Return the values of real edges and zero for all others, with the gradient of :func:`candidate_weights`."""
    return _ToCandidates.apply(edges.weight, edges.probe, edges, True)


def transformable(edges: RealEdges) -> Float[Tensor, " candidates"]:
    """Return the same as :func:`real_weights`, with operators that ``torch.func`` can transform; without a probe."""
    weight = edges.weight
    real = torch.zeros_like(weight).index_copy(0, edges.index, weight[edges.index])
    if edges.learning is edges.index:
        return real
    if edges.learning is not None:
        weight = weight.detach().index_copy(0, edges.learning, weight[edges.learning])
    # Exact: w + (w − w) is w, and w + (0 − w) is 0.
    return weight + (real - weight).detach()


def masked_weights(
    weight: Float[Tensor, ...],
    real: Float[Tensor, ...],
    learning: Float[Tensor, ...] | None,
    probe: Float[Tensor, ...] | None,
) -> Float[Tensor, ...]:
    """Return the same for the weight of a layer, with masks of its shape instead of indices.

    Args:
        weight: The values of the weights.
        real: 1 for real weights, 0 for hallucinated ones.
        learning: 1 for weights whose gradient is added to ``.grad``; None for all.
        probe: Accumulates the gradient of all weights; None if no rule needs it.
    """
    if learning is real and probe is None:
        return weight * real
    return _ToMasked.apply(weight, real, learning, probe)


class _ToCandidates(torch.autograd.Function):
    """Candidates by flat indices."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, probe: Tensor | None, edges: RealEdges, real: bool) -> Tensor:
        ctx.edges = edges
        if not real or edges.complete:
            return weight.view_as(weight)
        # Out of place: for an in-place copy torch.compile of PyTorch 2.11 computes a zero gradient.
        return torch.zeros_like(weight).index_copy(0, edges.index, weight[edges.index])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        edges: RealEdges = ctx.edges
        return edges.restrict(grads[0]), None if edges.probe is None else grads[0], None, None


class _ToMasked(torch.autograd.Function):
    """Candidates by masks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, real: Tensor, learning: Tensor | None, probe: Tensor | None) -> Tensor:
        return weight * real

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.learning, ctx.has_probe = inputs[2], inputs[3] is not None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] if ctx.learning is None else grads[0] * ctx.learning
        return grad, None, None, grads[0] if ctx.has_probe else None
