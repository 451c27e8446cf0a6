"""Real edges: what a rule must choose, and whether the weights that they were chosen for are still the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dnw_graph._compat import version
from dnw_graph.errors import InputError
from dnw_graph.ops.layout import plain_eager
from dnw_graph.wirings.base import Wiring

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

    def remember(self, weights: Sequence[Any], others: Iterable[Tensor]) -> None:
        """Keep a sample of the weights.

        Args:
            weights: Where they lie in the parameters, see :class:`~dnw_graph.wirings.view.RankedWeight`.
            others: What else the edges were chosen by; all of it is kept.
        """
        if type(self.index) is not Tensor or self.index.is_meta:
            return  # without values
        real, start = self.index[:: 1 + self.index.numel() // REAL], 0
        places: list[Tensor | None] = []
        for weight in weights:
            inside = real[(real >= start) & (real < start + weight.numel)] - start
            places.append(
                None if weight.numel <= WHOLE else torch.cat([weight.positions(inside), *_across(weight, inside)])
            )
            start += weight.numel
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


def _across(weight: Any, like: Tensor) -> Iterator[Tensor]:
    """Yield places of a parameter that lie evenly over the rows and the columns of the matrices of a weight."""
    for offset, rows, columns in weight.matrices:
        longer = max(rows, columns)
        steps = torch.arange(0, longer, 1 + longer // ACROSS, device=like.device)
        yield offset + steps % rows * columns + steps % columns


def _captured() -> bool:
    """Whether a CUDA graph is captured, in which the host cannot wait; no replay of it asks."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_index(index: object, wiring: Wiring, num_candidates: int, name: str, *, wait: bool) -> None:
    """Refuse what products over the edges cannot work with: they rely on flat indices in ascending order.

    Values are looked at only if the rule is not of this package.

    Args:
        index: What the rule chose.
        wiring: The rule.
        num_candidates: Number of candidate edges.
        name: Name of the graph, for messages.
        wait: Whether the host may synchronise with a device; if not, values are checked on a CPU only.

    Raises:
        InputError: If it is no int64 vector or, as far as looked at, not strictly ascending or out of range.
    """
    if not isinstance(index, Tensor):
        raise _wrong(wiring, num_candidates, name, f"a {type(index).__name__}")
    if index.dtype != torch.int64 or index.dim() != 1:
        raise _wrong(wiring, num_candidates, name, f"{index.dtype} of shape {list(index.shape)}")
    readable = index.is_cpu or (wait and not index.is_meta)
    if type(wiring).__module__.startswith("dnw_graph.") or not readable or not plain_eager():
        return
    wrong = index.diff(prepend=index.new_tensor([-1]), append=index.new_tensor([num_candidates])) <= 0
    if wrong.any():
        found = f"{len(index)} indices from {int(index.min())} to {int(index.max())}, {int(wrong.sum())} of them wrong"
        raise _wrong(wiring, num_candidates, name, found)


def _wrong(wiring: Wiring, num_candidates: int, name: str, found: str) -> InputError:
    return InputError(
        f"{name}: {type(wiring).__name__} must choose an int64 vector of indices in 0 … {num_candidates - 1:,}, "
        f"strictly ascending (indices.sort().values, mask.nonzero().flatten()); got {found}"
    )
