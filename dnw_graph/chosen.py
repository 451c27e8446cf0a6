"""Real edges, and whether they are still valid: whether their weights have changed since the choice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dnw_graph._compat import capturing, version
from dnw_graph.candidates import RankedWeight, split_index

WHOLE = 2048
"""Parameters up to this size are compared as a whole."""
REAL = 64
"""For larger ones, this many real edges of a graph are compared,"""
ACROSS = 128
"""and this many weights of every block, spread over its rows and columns."""


class Chosen:
    """Real edges, and the weights from which they were chosen.

    PyTorch records most changes of a parameter: a new object, a new storage or a higher version. It does not record
    writes through ``.data`` or by fused optimisers; a sample of the values is compared to detect those.

    Args:
        index: The real edges.
        tensors: The parameters.

    Attributes:
        learning: The edges that get a gradient, if they were asked for; None for all.
        derived: An object made from the edges.
    """

    def __init__(self, index: Int[Tensor, " edges"], tensors: Sequence[Tensor]) -> None:
        self.index = index
        self.learning: Tensor | None = None
        self.derived: Any = None
        # The detached aliases keep the storage alive, so that no other storage can get the same address.
        self._chosen_for = [(weight, weight.detach(), version(weight)) for weight in tensors]
        self._sample: list[tuple[Tensor, Tensor | None, Tensor]] | None = None  # None: chosen in training.

    def remember(self, weights: Sequence[RankedWeight], others: Iterable[Tensor]) -> None:
        """Keep a sample of the weights.

        Args:
            weights: The parts of the parameters, see :class:`~dnw_graph.candidates.RankedWeight`.
            others: Other tensors that the choice depends on; they are kept whole.
        """
        self._sample = []
        if type(self.index) is not Tensor or self.index.is_meta:
            return  # There are no values.
        real = split_index(self.index[:: 1 + self.index.numel() // REAL], weights)
        known = []
        for (parameter, alias, _), weight, own in zip(self._chosen_for, weights, real, strict=True):
            at = None if weight.numel <= WHOLE else torch.cat([weight.positions(own), *_across(weight, own)])
            known.append((parameter, alias, at))
        for tensor, values, at in [*known, *((each, each, None) for each in others)]:
            if type(tensor) in (Tensor, nn.Parameter):
                # A vector is read faster; other layouts would be copied.
                row = values.view(-1) if at is not None and values.is_contiguous() else values
                self._sample.append((row, at, _taken(row, at).detach().clone()))

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the edges are of an evaluation and the weights unchanged.

        It judges by object, storage, version and the sample.
        """
        sample = self._sample
        return (
            sample is not None
            and all(
                # Inference tensors have no version, so they count as changed.
                now is weight and alias.data_ptr() == now.data_ptr() and changes == version(now) != -1
                for now, (weight, alias, changes) in zip(tensors, self._chosen_for, strict=True)
            )
            and (capturing() or all(torch.equal(_taken(tensor, at), before) for tensor, at, before in sample))
        )


def _taken(tensor: Tensor, at: Tensor | None) -> Tensor:
    if at is None:
        return tensor
    return tensor.index_select(0, at) if tensor.dim() == 1 else torch.take(tensor, at)


def _across(weight: RankedWeight, like: Tensor) -> Iterator[Tensor]:
    """Yield positions in a parameter that are spread evenly over the rows and columns of a weight's matrices."""
    for offset, rows, columns in weight.matrices:
        longer = max(rows, columns)
        steps = torch.arange(0, longer, 1 + longer // ACROSS, device=like.device)
        yield offset + steps % rows * columns + steps % columns
