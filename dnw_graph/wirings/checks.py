"""What the indices that a rule chooses must be."""

from __future__ import annotations

import torch
from torch import Tensor

from dnw_graph.errors import InputError
from dnw_graph.ops.layout import unseen
from dnw_graph.wirings.base import Wiring


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
    if type(wiring).__module__.startswith("dnw_graph.") or not readable or not unseen():
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
