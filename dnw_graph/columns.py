"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Container, Sequence


def in_columns(rows: Sequence[Sequence[str]], left: Container[int]) -> str:
    """Return rows as lines with aligned columns.

    Args:
        rows: The cells.
        left: Numbers of the columns that are aligned to the left, the others to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:{'<' if n in left else '>'}{widths[n]}}" for n, cell in enumerate(row)).rstrip()
        for row in rows
    )
    return "\n".join(lines)
