"""The paper's definitions as plain loops, node by node and edge by edge, without any part of dnw_graph."""

import torch
import torch.nn.functional as F


def top_k(weights, k):
    """The positions of the k largest |w|, ties to the lower position, ascending: one Python sort."""
    return sorted(sorted(range(len(weights)), key=lambda i: (-abs(weights[i]), i))[:k])


def static_pairs(sizes):
    """Every pair (u, v) with u in an earlier block than v, ordered by block, target, source."""
    block_of = [block for block, size in enumerate(sizes) for _ in range(size)]
    nodes = range(len(block_of))
    return [(u, v) for v in nodes for u in nodes if block_of[u] < block_of[v]]


def relative_error(a, b):
    """‖a − b‖ / ‖b‖ in float64; the plain ‖a‖ where b is zero."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / (b.norm() if b.norm() > 0 else 1))


def batch_norm(maps, gamma, beta):
    """Training-mode batch norm of one node's maps [batch, height, width]."""
    mean = maps.sum() / maps.numel()
    variance = ((maps - mean) ** 2).sum() / maps.numel()
    return gamma * (maps - mean) / torch.sqrt(variance + 1e-5) + beta


def instance_norm(maps, gamma, beta):
    """Instance norm of one node's maps: every image by itself."""
    return torch.stack([batch_norm(image, gamma, beta) for image in maps])


def convolve(maps, kernel, stride=1):
    """Single-channel 3×3 convolution of maps [batch, height, width], padded with zeros."""
    height, width = maps.shape[1:]
    padded = F.pad(maps, (1, 1, 1, 1))
    terms = [kernel[i, j] * padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return sum(terms)[:, ::stride, ::stride]


def plain_forward(x, sizes, edges, node_function):
    """Line 6 of Algorithm 1: the states of all nodes, one by one, in order.

    Args:
        x: Inputs ``[batch, inputs, *space]``.
        sizes: Number of nodes of each block.
        edges: ``{(u, v): w_uv}``, the real edges.
        node_function: ``f(v, received)``, called for every node, the inputs too.

    Returns:
        The states Z_v, and for every node but the inputs (None) a zero that was added to I_v: after a backward pass its
        gradient is ∂L/∂I_v.
    """
    states, offsets = [], []
    for v in range(sum(sizes)):
        if v < sizes[0]:
            offset, received = None, x[:, v]
        else:
            offset = torch.zeros_like(states[0], requires_grad=True)
            received = offset + sum(w * states[u] for (u, target), w in edges.items() if target == v)
        offsets.append(offset)
        states.append(node_function(v, received))
    return states, offsets


def candidate_gradient(states, offsets, u, v):
    """⟨Z_u, ∂L/∂I_v⟩ by hand, after a backward pass."""
    if offsets[v].grad is None:  # no path of real edges leads from v to the loss
        return 0.0
    return float((states[u].detach() * offsets[v].grad).sum())


class Algorithm1:
    """Algorithm 1 of the paper, with momentum and weight decay in the update rule, in plain Python numbers.

    Args:
        sizes: Number of nodes of each block.
        k: Number of edges.
        weights: ``{(u, v): w_uv}`` for every pair u < v, in the order that breaks ties.
        theta: Parameter tensors of every node that has a function.
        node_function: ``f(theta_v, v, received)``.
        lr, momentum, weight_decay: Options of SGD as in PyTorch, for θ and the edges alike.
    """

    def __init__(self, sizes, k, weights, theta, node_function, lr, momentum, weight_decay):
        self.sizes, self.k, self.weights, self.theta, self.node_function = sizes, k, weights, theta, node_function
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.buffers = {}

    def choose_edges(self):
        """Line 5."""
        pairs = list(self.weights)
        return [pairs[i] for i in top_k(list(self.weights.values()), self.k)]

    def iterate(self, x, loss_of_outputs):
        """Lines 5 to 10; returns the real edges of this iteration and the loss."""
        edges = {pair: self.weights[pair] for pair in self.choose_edges()}
        for tensors in self.theta.values():
            for tensor in tensors:
                tensor.requires_grad_().grad = None
        states, offsets = plain_forward(
            x, self.sizes, edges, lambda v, received: self.node_function(self.theta.get(v), v, received)
        )
        loss = loss_of_outputs(torch.stack(states[-self.sizes[-1] :], dim=1))
        loss.backward()
        for v, tensors in self.theta.items():
            for i, tensor in enumerate(tensors):
                gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                tensor.data = self.sgd((v, i), tensor.detach(), gradient)
        for u, v in self.weights:
            gradient = candidate_gradient(states, offsets, u, v)
            self.weights[u, v] = self.sgd(("edge", u, v), self.weights[u, v], gradient)
        return list(edges), loss.item()

    def sgd(self, key, value, gradient):
        """One step of SGD with momentum and weight decay for one number or tensor."""
        gradient = gradient + self.weight_decay * value
        self.buffers[key] = self.momentum * self.buffers[key] + gradient if key in self.buffers else gradient
        return value - self.lr * self.buffers[key]
