"""The layers of a model that sparse momentum prunes and grows, and how much each grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.arguments import checked
from dnw_graph.cost import neural_graphs
from dnw_graph.selection import select_top_k
from dnw_graph.sparse_momentum.rule import SparseMomentum
from dnw_graph.sparsify import WeightGraph, weight_graphs


@dataclass(frozen=True)
class MomentumLayer:
    """Weights that sparse momentum prunes and grows together: those of one rule.

    Attributes:
        name: Name in messages.
        rule: Their rule.
        parameters: The parameters that hold them.
        flat: Returns tensors of the parameters' shapes, such as the momentum, as one vector in the rule's order.
        write: Sets the weights from such a vector.
    """

    name: str
    rule: SparseMomentum
    parameters: Sequence[Tensor]
    flat: Callable[[Sequence[Tensor]], Float[Tensor, " candidates"]]
    write: Callable[[Float[Tensor, " candidates"]], Any]

    def weight(self) -> Float[Tensor, " candidates"]:
        """Return the weights."""
        return self.flat(self.parameters)

    def prune(self, step: int, num_steps: int) -> int:
        """Take the real weights of smallest magnitude out of the real ones, and return their number."""
        real = torch.nonzero(self.rule.kept).flatten()
        rate = self.rule.prune_rate.value(step, num_steps + 1)  # a share of all steps: 1.0 is after the last one
        stay = max(1, real.numel() - math.ceil(rate * real.numel()))
        chosen = real[select_top_k(self.weight()[real], stay, self.name)]
        self.rule.kept.zero_().index_fill_(0, chosen, True)
        return real.numel() - stay

    def grow(self, momentum: Float[Tensor, " candidates"], number: int) -> None:
        """Make so many weights real, by the largest magnitude of momentum, and set all others to zero."""
        if number:
            zero = torch.nonzero(~self.rule.kept).flatten()
            self.rule.kept[zero[select_top_k(momentum[zero], number, self.name)]] = True
        self.write(self.weight().mul(self.rule.kept))


@checked
def momentum_layers(model: nn.Module) -> list[MomentumLayer]:
    """Return what of a model has the rule :class:`SparseMomentum`, in the order of the model."""
    layers = []
    for name, graph in neural_graphs(model).items():
        if isinstance(graph.wiring, SparseMomentum):
            weight = graph.candidates.weight
            layers.append(MomentumLayer(name, graph.wiring, (weight,), lambda tensors: tensors[0], weight.copy_))
    for name, weights in weight_graphs(model).items():
        if isinstance(weights.wiring, SparseMomentum):
            parameters = [weight.parameter for weight in weights.weights]
            layers.append(MomentumLayer(name, weights.wiring, parameters, partial(_flat, weights), weights.write))
    return layers


def _flat(graph: WeightGraph, tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([weight.flat(tensor) for weight, tensor in zip(graph.weights, tensors, strict=True)])


def allot(total: int, shares: Sequence[float], room: Sequence[int]) -> list[int]:
    """Return whole numbers in proportion to shares, each at most its room, that add up to a total.

    A layer whose share is more than its room is filled; what is beyond goes to the others in proportion to their
    shares. Fractions go to the largest remainders, ties to the earlier layer. Where no share is left, all are equal.

    Args:
        total: The sum; at most that of ``room``.
        shares: Shares, 0 or more.
        room: Largest number for each.
    """
    numbers = [0] * len(room)
    rest, open_layers = total, list(range(len(room)))
    while True:
        parts = {i: Fraction(shares[i]) for i in open_layers}
        if not any(parts.values()):
            parts = dict.fromkeys(open_layers, Fraction(1))
        exact = {i: rest * part / sum(parts.values()) for i, part in parts.items()}
        full = [i for i in open_layers if exact[i] >= room[i]]
        if not full:
            break
        for i in full:
            numbers[i] = room[i]
            rest -= room[i]
        open_layers = [i for i in open_layers if i not in full]
    for i in open_layers:
        numbers[i] = math.floor(exact[i])
    remainders = sorted(open_layers, key=lambda i: numbers[i] - exact[i])
    for i in remainders[: rest - sum(numbers[i] for i in open_layers)]:
        numbers[i] += 1
    return numbers
