"""Real edges, and whether the weights that they were chosen for are still the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dnw_graph._compat import version

WHOLE = 2048
"""Up to this size all weights of a parameter are compared."""
REAL = 64
"""Of larger ones, as many real edges of a graph are,"""
ACROSS = 128
"""and as many weights of every block, spread over its rows and columns."""


class Chosen:
    """Real edges, together with the weights that they were chosen for.

    PyTorch records most changes of a parameter: another object, another storage, a higher version. It does not record
    what is written through ``.data`` or by fused optimisers; for that a sample of the values is compared.

    Args:
        index: The real edges.
        tensors: The parameters.
    """

    def __init__(self, index: Int[Tensor, " edges"], tensors: Sequence[Tensor]) -> None:
        self.index = index
        self.derived: Any = None
        # The detached aliases keep the storage alive: no other storage can come to lie at the same address.
        self._chosen_for = [(weight, weight.detach(), version(weight)) for weight in tensors]
        self._sample: list[tuple[Tensor, Tensor | None, Tensor]] = []

    def remember(self, slots: Sequence[Any], others: Iterable[Tensor]) -> None:
        """Keep a sample of the weights.

        Args:
            slots: Where they lie in the parameters, see :class:`~dnw_graph.wirings.view.Slot`.
            others: What else the edges were chosen by; all of it is kept.
        """
        if type(self.index) is not Tensor or self.index.is_meta:
            return  # without values
        real, start = self.index[:: 1 + self.index.numel() // REAL], 0
        places: list[Tensor | None] = []
        for slot in slots:
            inside = real[(real >= start) & (real < start + slot.numel)] - start
            places.append(None if slot.numel <= WHOLE else torch.cat([slot.positions(inside), *_across(slot, inside)]))
            start += slot.numel
        known = [(weight, alias, at) for (weight, alias, _), at in zip(self._chosen_for, places, strict=True)]
        for tensor, values, at in [*known, *((each, each, None) for each in others)]:
            if type(tensor) in (Tensor, nn.Parameter):
                # One row is read faster; of what lies in another order it would be a copy.
                row = values.view(-1) if at is not None and values.is_contiguous() else values
                self._sample.append((row, at, _taken(row, at).detach().clone()))

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same weights, as far as object, storage, version and the sample tell."""
        return all(
            # Inference tensors keep no version: nothing tells whether they have changed.
            now is weight and alias.data_ptr() == now.data_ptr() and changes == version(now) != -1
            for now, (weight, alias, changes) in zip(tensors, self._chosen_for, strict=True)
        ) and (_captured() or all(torch.equal(_taken(tensor, at), before) for tensor, at, before in self._sample))


def _taken(tensor: Tensor, at: Tensor | None) -> Tensor:
    if at is None:
        return tensor
    return tensor.index_select(0, at) if tensor.dim() == 1 else torch.take(tensor, at)


def _across(slot: Any, like: Tensor) -> Iterator[Tensor]:
    """Yield places of a parameter that lie evenly over the rows and the columns of the matrices of a slot."""
    for offset, rows, columns in slot.matrices:
        longer = max(rows, columns)
        steps = torch.arange(0, longer, 1 + longer // ACROSS, device=like.device)
        yield offset + steps % rows * columns + steps % columns


def _captured() -> bool:
    """Whether a CUDA graph is captured, in which the host cannot wait; no replay of it asks."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
