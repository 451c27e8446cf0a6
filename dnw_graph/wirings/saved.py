"""Checks of a rule's saved state, which may come from a file; products over the edges rely on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dnw_graph.arguments import require, shown
from dnw_graph.errors import InputError
from dnw_graph.ops.layout import transformed

DAMAGED = "the file is damaged or of another graph"


def refuse_edges(
    index: object, num_candidates: int, what: str, *, number: int | None = None, read: bool = True, hint: str = DAMAGED
) -> None:
    """Refuse anything but distinct candidates in ascending order, on which products over the edges rely.

    Args:
        index: The flat indices of the edges.
        num_candidates: Number of candidates.
        what: Name of the indices in messages.
        number: Number of edges. Default: any.
        read: Whether values are checked; those on the meta device never are.
        hint: What to do about it, for messages.

    Raises:
        InputError: If it is anything else.
    """
    found = None
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        found = shown(index)
    elif number not in (None, len(index)):
        found = f"{len(index):,}"
    elif read and not index.is_meta:
        ends = index.new_tensor([-1]), index.new_tensor([num_candidates])
        if bool((index.diff(prepend=ends[0], append=ends[1]) <= 0).any()):
            outside = int(((index < 0) | (index >= num_candidates)).sum())
            repeated = len(index) - len(index.unique())
            found = f"{outside:,} outside, {repeated:,} repeated, {int((index.diff() < 0).sum()):,} out of order"
    if found is None:
        return
    edges = "" if number is None else f"{number:,} edges, "
    raise InputError(
        f"{what} must be an int64 vector of {edges}distinct candidates in 0 … {num_candidates - 1:,}, ascending; "
        f"got {found}: {hint}"
    )


def refuse_mask(mask: object, num_candidates: int, what: str) -> None:
    """Refuse a mask that is not one byte per candidate, or that selects none.

    Args:
        mask: The mask.
        num_candidates: Number of candidates.
        what: Name of the mask in messages.

    Raises:
        InputError: If it is anything else; values on the meta device are not checked.
    """
    fits = isinstance(mask, Tensor) and mask.dtype in (torch.uint8, torch.bool)
    some = isinstance(mask, Tensor) and mask.shape == (num_candidates,) and (mask.is_meta or bool(mask.any()))
    require(fits and some, what, f"a uint8 vector of the {num_candidates:,} candidates, at least one of them 1", mask)


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
        InputError: If they differ; values on the meta device and under a ``torch.func`` transform are not checked.
    """
    if not isinstance(checksum, Tensor) or checksum.is_meta or edges.is_meta or transformed():
        return
    if bool(edge_sum(edges) != checksum):
        raise InputError(
            f"{what} are not the edges that the rule stored: an average of models must copy this buffer, not average "
            "it, as AveragedModel(use_buffers=False) does; or the file is damaged"
        )


def saved_number(saved: Mapping[str, Any], key: str, what: str) -> int | None:
    """Return a saved integer, or None if it is missing or without a value.

    Args:
        saved: Saved state by name.
        key: Its name.
        what: Its name in messages.

    Raises:
        InputError: If it is not an int64 scalar >= 0.
    """
    if (value := saved.get(key)) is None:
        return None
    scalar = isinstance(value, Tensor) and value.dtype == torch.int64 and not value.dim()
    require(scalar and (value.is_meta or int(value) >= 0), what, "one int64 number >= 0", value)
    return None if value.is_meta else int(value)
