"""Real edges, and whether they are still valid: whether the weights that they were chosen by have changed."""

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
"""Parameters of up to this size are compared as a whole."""
REAL = 64
"""Of larger ones, so many real edges of a graph are compared,"""
ACROSS = 128
"""and so many weights of every block, spread over its rows and columns."""


class Chosen:
    """Real edges, and the weights that they were chosen by.

    PyTorch records most changes of a parameter: a new object, a new storage or a higher version. It does not record
    writes through ``.data`` or by fused optimisers; a sample of the values is compared to detect those.

    Args:
        index: The real edges.
        tensors: The parameters.
    """

    def __init__(self, index: Int[Tensor, " edges"], tensors: Sequence[Tensor]) -> None:
        self.index = index
        self.derived: Any = None
        # The detached aliases keep the storage alive, so that no other storage can get the same address.
        self._chosen_for = [(weight, weight.detach(), version(weight)) for weight in tensors]
        self._sample: list[tuple[Tensor, Tensor | None, Tensor]] = []

    def remember(self, weights: Sequence[Any], others: Iterable[Tensor]) -> None:
        """Keep a sample of the weights.

        Args:
            weights: The parts of the parameters, see :class:`~dnw_graph.wirings.view.RankedWeight`.
            others: Other tensors that the choice depends on; they are kept whole.
        """
        if type(self.index) is not Tensor or self.index.is_meta:
            return  # There are no values.
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
                # A vector is read faster; other layouts would be copied.
                row = values.view(-1) if at is not None and values.is_contiguous() else values
                self._sample.append((row, at, _taken(row, at).detach().clone()))

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the weights are unchanged, judging by object, storage, version and the sample."""
        return all(
            # Inference tensors have no version, so they count as changed.
            now is weight and alias.data_ptr() == now.data_ptr() and changes == version(now) != -1
            for now, (weight, alias, changes) in zip(tensors, self._chosen_for, strict=True)
        ) and (_captured() or all(torch.equal(_taken(tensor, at), before) for tensor, at, before in self._sample))


def _taken(tensor: Tensor, at: Tensor | None) -> Tensor:
    if at is None:
        return tensor
    return tensor.index_select(0, at) if tensor.dim() == 1 else torch.take(tensor, at)


def _across(weight: Any, like: Tensor) -> Iterator[Tensor]:
    """Yield positions in a parameter that are spread evenly over the rows and columns of a weight's matrices."""
    for offset, rows, columns in weight.matrices:
        longer = max(rows, columns)
        steps = torch.arange(0, longer, 1 + longer // ACROSS, device=like.device)
        yield offset + steps % rows * columns + steps % columns


def _captured() -> bool:
    """Return whether a CUDA graph is being captured: the host cannot wait then, and a replay does not call this."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_index(index: object, wiring: Wiring, num_candidates: int, name: str, *, wait: bool) -> None:
    """Refuse indices that the products cannot use; they rely on ascending flat indices.

    Values are checked only for rules from outside this package.

    Args:
        index: The rule's choice.
        wiring: The rule.
        num_candidates: Number of candidate edges.
        name: Name of the graph, for messages.
        wait: Whether the host may synchronise with a device; if not, values are checked on a CPU only.

    Raises:
        InputError: If it is no int64 vector or, where values are checked, not strictly ascending or out of range.
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
