"""Encodes the positions in a sparse matrix as 8-bit gaps: a byte per value, and one for every 255 zeros in a row."""

from __future__ import annotations

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from dnw_graph.compaction.plain_layers import require

FAR = 255
"""A byte that encodes this many zeros and no value."""


def to_gaps(rowptr: Int[Tensor, " rows"], columns: Int[Tensor, " values"], sources: int) -> UInt8[Tensor, " bytes"]:
    """Return the number of zeros before each value, row after row, in bytes.

    Args:
        rowptr: Start of the values of each row; columns ascend within a row.
        columns: The column of each value.
        sources: Number of columns.
    """
    rows = torch.repeat_interleave(rowptr.cpu().long().diff())
    places = rows * sources + columns.cpu().long()
    zeros = places.diff(prepend=places.new_tensor([-1])) - 1
    far = zeros // FAR
    gaps = torch.full((len(columns) + int(far.sum()),), FAR, dtype=torch.uint8, device="cpu")
    gaps[(far + 1).cumsum(0) - 1] = (zeros % FAR).to(torch.uint8)
    return gaps


def from_gaps(
    gaps: UInt8[Tensor, " bytes"], rows: int, sources: int, index: torch.dtype
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " values"]]:
    """Return row pointers and columns of a matrix with ``rows`` rows and ``sources`` columns.

    Raises:
        InputError: If a position lies outside the matrix.
    """
    require(gaps.dtype is torch.uint8 and gaps.dim() == 1, "gaps must be a list of bytes")
    is_value = gaps != FAR
    require(not len(gaps) or bool(is_value[-1]), "gaps must end with a value")
    places = (gaps.long() + is_value.long()).cumsum(0)[is_value] - 1
    require(rows >= 0 and sources >= 0 and rows * sources < 2**62, f"{rows} × {sources} values do not fit in memory")
    require(not len(places) or int(places[-1]) < rows * sources, f"a value lies outside {rows} rows of {sources}")
    rowptr = torch.searchsorted(places, torch.arange(rows + 1, device=places.device) * sources)
    return rowptr.to(index), (places % max(sources, 1)).to(index)
