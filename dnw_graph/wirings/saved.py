"""Checks of a rule's saved state, which may come from a file; products over the edges rely on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dnw_graph.errors import InputError


def refuse_edges(index: object, num_candidates: int, num_edges: int, what: str) -> None:
    """Refuse indices that are not k distinct candidates in ascending order.

    Args:
        index: The flat indices of the edges.
        num_candidates: Number of candidates.
        num_edges: k.
        what: Name of the indices in messages.

    Raises:
        InputError: If it is another tensor; values on the meta device are not checked.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != (num_edges,):
        raise InputError(f"{what} must be an int64 tensor of the {num_edges:,} edges; got {_shown(index)}")
    if index.is_meta:
        return
    bounds = index.new_tensor([-1]), index.new_tensor([num_candidates])
    if bool((index.diff(prepend=bounds[0], append=bounds[1]) <= 0).any()):
        raise InputError(
            f"{what} must be distinct candidates in 0 … {num_candidates - 1:,}, ascending; got "
            f"{_count(index, num_candidates)}: the file is damaged or belongs to another graph"
        )


def refuse_mask(mask: object, num_candidates: int, what: str) -> None:
    """Refuse a mask that is not one byte per candidate, or that selects none.

    Args:
        mask: The mask.
        num_candidates: Number of candidates.
        what: Name of the mask in messages.

    Raises:
        InputError: If it is another tensor or selects none; values on the meta device are not checked.
    """
    kinds = (torch.uint8, torch.bool)
    if not isinstance(mask, Tensor) or mask.dtype not in kinds or mask.shape != (num_candidates,):
        raise InputError(f"{what} must be a uint8 tensor of the {num_candidates:,} candidates; got {_shown(mask)}")
    if not mask.is_meta and not mask.any():
        raise InputError(f"{what} must hold at least one candidate; got none: the file is damaged")


def edge_sum(edges: Tensor) -> Int[Tensor, ""]:
    """Return a checksum of a set of edges, in 0 … 2²⁰ - 1. For indices it does not synchronise.

    Averaging in float32 preserves integers as small as this.

    Args:
        edges: Flat indices in any order, or a mask.
    """
    if edges.is_meta:
        return edges.new_empty((), dtype=torch.int64)
    mixed = ((edges if edges.dtype == torch.int64 else edges.nonzero().flatten()) + 1) * 0x1E3779B97F4A7C15
    return ((mixed ^ (mixed >> 31)) * 0x3F58476D1CE4E5B9).sum() >> 43 & (2**20 - 1)


def refuse_spoiled(edges: Tensor, checksum: object, what: str) -> None:
    """Refuse edges that differ from those of the stored checksum.

    Args:
        edges: Flat indices, or a mask with a byte per candidate.
        checksum: The result of :func:`edge_sum` when they were stored; None in older files.
        what: Name of the edges in messages.

    Raises:
        InputError: If they differ; values on the meta device are not checked.
    """
    if not isinstance(checksum, Tensor) or checksum.is_meta or edges.is_meta:
        return
    if bool(edge_sum(edges) != checksum):
        raise InputError(
            f"{what} are not the edges that the rule stored: an average of models must copy this buffer, not average "
            "it, as AveragedModel(use_buffers=False) does; or the file is damaged"
        )


def refuse_counts(saved: Mapping[str, Any], names: Collection[str], what: str) -> None:
    """Refuse counters, such as numbers of steps, that are not integers >= 0.

    Args:
        saved: Saved state by name.
        names: Names of the counters; they may be missing.
        what: Name of the state in messages.

    Raises:
        InputError: If a counter is something else.
    """
    for key in saved.keys() & names:
        value = saved[key]
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim():
            raise InputError(f"{what}.{key} must be one int64 number; got {_shown(value)}")
        if not value.is_meta and int(value) < 0:
            raise InputError(f"{what}.{key} must be 0 or more; got {int(value)}: the file is damaged")


def _count(index: Tensor, num_candidates: int) -> str:
    outside = int(((index < 0) | (index >= num_candidates)).sum())
    repeated = len(index) - len(index.unique())
    return f"{outside:,} outside, {repeated:,} repeated, {int((index.diff() < 0).sum()):,} out of order"


def _shown(value: object) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
