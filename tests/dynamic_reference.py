"""Dynamic graphs (Section 2.3 of the paper) as plain loops over a dense adjacency, without any part of dnw_graph."""

import torch
from reference import batch_norm, convolve, instance_norm, top_k
from torch import nn

NORMS = {"batch": batch_norm, "instance": instance_norm}


def all_pairs(num_nodes):
    """Every pair (u, v), self-loops included, ordered by target, source."""
    return [(u, v) for v in range(num_nodes) for u in range(num_nodes)]


def dense_adjacency(num_nodes, pairs, weights, k):
    """A[v, u] = w_uv for the k pairs of largest |w|, zero for all others."""
    weights = weights.detach()
    matrix = torch.zeros(num_nodes, num_nodes, dtype=weights.dtype)
    for i in top_k(weights.tolist(), k):
        u, v = pairs[i]
        matrix[v, u] = weights[i]
    return matrix


def product(matrix, z):
    """A Z for states [batch, nodes, *space]."""
    return torch.einsum("vu,bu...->bv...", matrix, z)


def plain_discrete(x, matrix, steps, function, input_mode="initial", send=None):
    """Equations 10 and 11, step by step.

    Args:
        x: Inputs ``[batch, inputs, *space]``, or ``[batch, time, inputs, *space]`` for a sequence.
        matrix: The dense adjacency.
        steps: L.
        function: ``f(received, step)`` for all nodes.
        input_mode: Whether inputs flow in at step 0 only, at every step again, or as a sequence.
        send: What happens to states before they are propagated, ``send(z, step)``.

    Returns:
        The states at steps 0 … L, what was sent at steps 0 … L - 1, and zeros that were added to I(ℓ): after a backward
        pass their gradients are ∂L/∂I(ℓ).
    """

    def let_in(z, step):
        now = x[:, step] if input_mode == "sequence" else x
        return torch.cat([now, z[:, now.size(1) :]], dim=1)

    space = x.shape[3:] if input_mode == "sequence" else x.shape[2:]
    z = let_in(torch.zeros(x.size(0), matrix.size(0), *space, dtype=x.dtype), 0)
    states, sent, offsets = [z], [], []
    for step in range(steps):
        if step > 0 and input_mode != "initial":
            z = states[-1] = let_in(z, step)
        sent.append(z if send is None else send(z, step))
        offsets.append(torch.zeros_like(sent[-1]).requires_grad_())
        z = function(product(matrix, sent[-1]) + offsets[-1], step)
        states.append(z)
    return states, sent, offsets


def summed_gradient(sent, offsets, u, v):
    """Σ over the steps of ⟨Z_u(ℓ), ∂L/∂I_v(ℓ)⟩ by hand, after a backward pass."""
    return sum(float((z[:, u].detach() * offset.grad[:, v]).sum()) for z, offset in zip(sent, offsets, strict=True))


def node_by_node(one, z):
    """Apply ``one(v, maps)`` to the maps of every node."""
    return torch.stack([one(v, z[:, v]) for v in range(z.size(1))], dim=1)


def plain_norm_relu_conv(p, norm, z, stride=1):
    """Norm → ReLU → 3×3 convolution; p holds the tensors by name."""

    def one(v, maps):
        normed = NORMS[norm](maps, p["norm.weight"][v], p["norm.bias"][v])
        return convolve(normed.relu(), p["conv.weight"][v, 0], stride)

    return node_by_node(one, z)


def plain_relu_conv(p, z):
    """ReLU → 3×3 convolution."""
    return node_by_node(lambda v, maps: convolve(maps.relu(), p["conv.weight"][v, 0]), z)


def plain_norm(p, norm, z):
    """The norm alone."""
    return node_by_node(lambda v, maps: NORMS[norm](maps, p["norm.weight"][v], p["norm.bias"][v]), z)


class Timed(torch.nn.Module):
    """A smooth node function that depends on time: tanh((1 + r_v (1 + t)) I_v)."""

    def __init__(self, num_nodes, stride=1):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.empty(num_nodes).uniform_(-1, 1))

    def forward(self, z, t):
        rate = self.rate.view(-1, *[1] * (z.dim() - 2))
        return torch.tanh((1 + rate * (1 + t)) * z)


def plain_timed(p, z, t):
    """What :class:`Timed` does, node by node."""
    return node_by_node(lambda v, values: torch.tanh(values + p["rate"][v] * values * (1 + t)), z)


def euler(field, z, t_span, steps):
    """The states after every step of Euler's method."""
    start, stop = t_span
    h = (stop - start) / steps
    states = []
    for step in range(steps):
        z = z + h * field(start + step * h, z)
        states.append(z)
    return states


def runge_kutta(field, z, t_span, steps):
    """The state at the end by the classical Runge–Kutta method of order 4."""
    start, stop = t_span
    h = (stop - start) / steps
    for step in range(steps):
        t = start + step * h
        a = field(t, z)
        b = field(t + h / 2, z + h / 2 * a)
        c = field(t + h / 2, z + h / 2 * b)
        d = field(t + h, z + h * c)
        z = z + h / 6 * (a + 2 * b + 2 * c + d)
    return z


class Changed(nn.Module):
    """A node function that changes states as it is told."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, z):
        return self.change(z)
