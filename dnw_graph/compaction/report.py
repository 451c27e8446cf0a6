"""The report of ``compact``: sizes of a model before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dnw_graph.columns import in_columns


@dataclass
class Size:
    """Size of a model or of a graph.

    Attributes:
        nodes: Number of nodes.
        edges: Number of real edges.
        parameters: Number of parameters as counted by :func:`~dnw_graph.analysis.cost.cost`, including dead nodes. For
            a compact model, all stored numbers (a discrete graph stores its first and last step separately).
        multiply_adds: Multiply-adds for one image of the example, counted likewise; None without example, or if those
            of an operator are unknown.
    """

    nodes: int = 0
    edges: int = 0
    parameters: int = 0
    multiply_adds: int | None = None


@dataclass(frozen=True)
class LayerRow:
    """The result for a linear layer or a convolution.

    Attributes:
        name: Its name in the original model.
        weights: Number of its weights, without those of dead channels.
        kept: Number of non-zero weights.
        form: ``"sparse"`` or ``"dense"``.
        why_dense: Why it is dense, or empty.
        bytes: Size of weights and bias in a file.
        multiply_adds: Multiply-adds with non-zero weights, for one image of the example; None without example.
    """

    name: str
    weights: int
    kept: int
    form: str
    why_dense: str
    bytes: int
    multiply_adds: int | None


@dataclass
class Report:
    """What :func:`~dnw_graph.compaction.compact` changed in a model.

    Attributes:
        before: Size of the model with all its nodes.
        after: Size of the compact model.
        graphs: Nodes and edges before and after, by graph.
        layers: A row for every linear layer and convolution; printed if one of them has zeros.
        kept: Node functions that could not be cut to single nodes and are kept whole.
        adaptive: Names of the graphs with an adaptive solver, whose steps depend on the nodes.
        difference: ‖compact − original‖ / ‖original‖ of the outputs for the example, None without example.
        tolerance_difference: With an adaptive solver, the same between the original's outputs with its tolerances and
            with a tenth of them.
    """

    before: Size = field(default_factory=Size)
    after: Size = field(default_factory=Size)
    graphs: dict[str, tuple[Size, Size]] = field(default_factory=dict)
    layers: list[LayerRow] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    adaptive: list[str] = field(default_factory=list)
    difference: float | None = None
    tolerance_difference: float | None = None

    def add(self, name: str, before: Size, after: Size) -> None:
        """Count a graph."""
        self.graphs[name] = (before, after)
        for total, size in ((self.before, before), (self.after, after)):
            total.nodes += size.nodes
            total.edges += size.edges

    def _layer_table(self) -> str:
        cells = [("layer", "weights", "kept", "form", "bytes", "multiply-adds", "")]
        for row in self.layers:
            count = "" if row.multiply_adds is None else f"{row.multiply_adds:,}"
            numbers = (f"{row.weights:,}", f"{row.kept:,}", row.form, f"{row.bytes:,}", count)
            cells.append((row.name, *numbers, row.why_dense))
        return in_columns(cells, left=(0, 3, 6))

    def __str__(self) -> str:
        lines = [f"{'':14}{'before':>14}{'after':>14}"]
        for name in ("nodes", "edges", "parameters", "multiply_adds"):
            before, after = getattr(self.before, name), getattr(self.after, name)
            if before:  # A model without graphs has no nodes.
                lines.append(f"{name.replace('_adds', '-adds'):14}{before:14,}{after:14,}")
        for name, (old, new) in self.graphs.items():
            lines.append(f"{name}: {old.nodes:,} → {new.nodes:,} nodes, {old.edges:,} → {new.edges:,} edges")
        if any(row.kept < row.weights for row in self.layers):
            lines.append(self._layer_table())
        lines += [f"kept whole: {what}" for what in self.kept]
        if self.difference is not None:
            lines.append(f"outputs differ by {self.difference:.1e}")
        if self.tolerance_difference is not None:
            lines.append(f"a tenth of the tolerances changes the original's by {self.tolerance_difference:.1e}")
        elif self.adaptive:
            lines.append(
                f"{', '.join(self.adaptive)}: an adaptive solver depends on all nodes, so outputs differ within its "
                "tolerance; give an example to see how much"
            )
        return "\n".join(lines)


def relative_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return ‖a − b‖ / ‖b‖ over all tensors, or 0 if they are equal."""
    differences = [float((x - y).norm()) for x, y in zip(a, b, strict=True)]
    norm = math.hypot(*(float(y.norm()) for y in b))
    return math.hypot(*differences) / norm if any(differences) and norm else 0.0
