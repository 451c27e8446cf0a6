"""The table that ``sparsify`` returns."""

from __future__ import annotations

from dataclasses import dataclass

from dnw_graph.columns import in_columns


@dataclass(frozen=True)
class SparsityRow:
    """One weight.

    Attributes:
        name: Its name, or names if several layers share it; a projection in ``in_proj_weight`` adds ``.q``, ``.k`` or
            ``.v``.
        shape: Its shape.
        weights: Number of weights.
        kept: Number of real weights; all if the weight stays dense.
        dense_because: Why the weight stays dense, or empty.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    dense_because: str = ""


@dataclass(frozen=True)
class SparsityTable:
    """All parameters of a module with two or more dimensions; ``print`` shows a table.

    Attributes:
        rows: The weights in the order of the module.
    """

    rows: tuple[SparsityRow, ...]

    @property
    def sparse(self) -> tuple[SparsityRow, ...]:
        """The weights that are sparse now."""
        return tuple(row for row in self.rows if not row.dense_because)

    @property
    def weights(self) -> int:
        """Number of weights in the sparse layers."""
        return sum(row.weights for row in self.sparse)

    @property
    def kept(self) -> int:
        """Number of real weights in the sparse layers."""
        return sum(row.kept for row in self.sparse)

    def __str__(self) -> str:
        cells = [("weight", "shape", "weights", "kept", "share", "")]
        for row in (*self.rows, SparsityRow("total, sparse layers", (), self.weights, self.kept)):
            shape = "×".join(map(str, row.shape))
            note = f"dense: {row.dense_because}" if row.dense_because else ""
            cells.append((row.name, shape, f"{row.weights:,}", f"{row.kept:,}", f"{row.kept / row.weights:.2%}", note))
        return in_columns(cells, left=(0, 1, 5))
