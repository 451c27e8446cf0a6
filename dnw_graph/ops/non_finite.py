"""Dense products with states that are NaN or infinite: 0 · ∞ is NaN, also where there is no edge."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dnw_graph.ops.layout import unseen

# Largest number of products that are formed at once.
AT_ONCE = 2**22


def spread(received: Float[Tensor, "batch targets *space"]) -> bool:
    """Return whether a dense product may have let NaN reach targets without an edge.

    One target tells: each multiplies every source, if only by zero. Nobody looks where the host would have to wait for
    a device, or where operators are traced, transformed or counted.

    Args:
        received: The product.
    """
    if not received.is_cpu or not received.numel() or not unseen():
        return False
    return not math.isfinite(received.detach()[:, 0].sum().item())


@torch.no_grad()
def follow_edges(
    received: Float[Tensor, "batch targets *space"],
    z: Float[Tensor, "batch sources *space"],
    targets: Int[Tensor, " edges"],
    sources: Int[Tensor, " edges"],
    weight: Float[Tensor, "targets sources"],
    bias: Float[Tensor, " targets"] | None = None,
) -> None:
    """Compute a product anew, over its edges alone, at the places where it has spread NaN; in place.

    The gradients of the product stay what they are.

    Args:
        received: The dense product, with the bias added.
        z: States of the sources.
        targets: Target of every edge.
        sources: Source of every edge.
        weight: The dense matrix.
        bias: What the targets receive besides.
    """
    values = weight[targets, sources].to(received.dtype)
    last, z = received.movedim(1, -1), z.movedim(1, -1)
    places = last[..., 0].isfinite().logical_not().nonzero()
    for part in places.split(max(1, AT_ONCE // max(1, len(values)))):
        place = part.unbind(1)
        sums = received.new_zeros(len(part), len(weight)) if bias is None else bias.to(received).repeat(len(part), 1)
        last[place] = sums.index_add_(1, targets, z[place][:, sources].to(received.dtype) * values)
