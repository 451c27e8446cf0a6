"""What was saved: sizes of a model before and after its dead nodes were removed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.candidates import CandidateEdges
from dnw_graph.compaction.layers import Conv, Layer, Linear
from dnw_graph.compaction.products import DenseProduct, SparseProduct
from dnw_graph.neural_graph import NeuralGraph


@dataclass
class Size:
    """Size of a model or of a graph.

    Attributes:
        nodes: Number of nodes.
        edges: Number of real edges.
        parameters: Number of parameters: the weights of real edges, and those of all other layers. Of a compact model,
            all numbers that it stores (a discrete graph stores its first and its last step apart).
        multiply_adds: Multiply-adds of real edges, convolutions and linear layers for one image of the example; None
            without example.
    """

    nodes: int = 0
    edges: int = 0
    parameters: int = 0
    multiply_adds: int | None = None


@dataclass
class Report:
    """What :func:`~dnw_graph.compaction.compact` did to a model.

    Attributes:
        before: Size of the model with all its nodes.
        after: Size of the compact model.
        graphs: Nodes and edges before and after, by graph.
        kept: What could not be cut to single nodes and is kept whole.
        adaptive: Names of the graphs with an adaptive solver, whose steps depend on the nodes.
        difference: ‖compact − original‖ / ‖original‖ of the outputs for the example, None without example.
        tolerance_difference: With an adaptive solver, the same between the original's outputs with a tenth of its
            tolerances and those with the tolerances as they are.
    """

    before: Size = field(default_factory=Size)
    after: Size = field(default_factory=Size)
    graphs: dict[str, tuple[Size, Size]] = field(default_factory=dict)
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

    def __str__(self) -> str:
        lines = [f"{'':14}{'before':>14}{'after':>14}"]
        for name in ("nodes", "edges", "parameters", "multiply_adds"):
            before, after = getattr(self.before, name), getattr(self.after, name)
            if before:  # a model without graphs has no nodes
                lines.append(f"{name.replace('_adds', '-adds'):14}{before:14,}{after:14,}")
        for name, (old, new) in self.graphs.items():
            lines.append(f"{name}: {old.nodes:,} → {new.nodes:,} nodes, {old.edges:,} → {new.edges:,} edges")
        lines += [f"kept whole: {what}" for what in self.kept]
        if self.difference is not None:
            lines.append(f"outputs differ by {self.difference:.1e}")
        if self.tolerance_difference is not None:
            lines.append(f"a tenth of the solver's tolerances moves the original's by {self.tolerance_difference:.1e}")
        elif self.adaptive:
            lines.append(
                f"{', '.join(self.adaptive)}: an adaptive solver sees all nodes, so outputs differ within its "
                "tolerance; give an example to see how much"
            )
        return "\n".join(lines)


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a model: of graphs the real edges, of dense products what is not zero."""
    total = 0
    counted: set[nn.Parameter] = set()
    for layer in module.modules():
        if isinstance(layer, Layer):
            total += layer.own_parameters()
        elif isinstance(layer, NeuralGraph):
            total += layer.num_real_edges
        elif not isinstance(layer, CandidateEdges):
            own = set(layer.parameters(recurse=False)) - counted
            counted |= own
            total += sum(parameter.numel() for parameter in own)
    return total


def count_multiply_adds(module: nn.Module, example: Tensor) -> int:
    """Return the multiply-adds of a compact model without fused graphs for one example, zeros of products left out."""
    total = 0

    def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, SparseProduct):
            total += layer.num_edges * math.prod(output.shape[2:])
        elif isinstance(layer, DenseProduct):
            total += int(layer.weight.count_nonzero()) * math.prod(output.shape[2:])
        elif isinstance(layer, Linear | nn.Linear):
            total += layer.weight.numel() * math.prod(output.shape[1:-1])
        elif isinstance(layer, Conv | nn.Conv2d):
            total += layer.weight.numel() * math.prod(output.shape[2:])

    kinds = (SparseProduct, DenseProduct, Linear, nn.Linear, Conv, nn.Conv2d)
    handles = [layer.register_forward_hook(hook) for layer in module.modules() if isinstance(layer, kinds)]
    try:
        with torch.no_grad():
            module(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    return total


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖, and 0 where both are zero."""
    difference = (a - b).norm()
    return float(difference / b.norm()) if difference else 0.0
