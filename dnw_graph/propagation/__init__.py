"""The product Z → I over the real edges: three implementations, one result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dnw_graph.propagation.auto import AutoPropagation
from dnw_graph.propagation.block import BlockPropagation
from dnw_graph.propagation.message_passing import MessagePassingPropagation
from dnw_graph.propagation.propagate import Propagate, Propagation, RealEdges, States
from dnw_graph.propagation.sparse import SparsePropagation
from dnw_graph.registry import resolve

if TYPE_CHECKING:
    from dnw_graph.propagation.weighted_sum import WeightedSum

__all__ = [
    "PROPAGATIONS",
    "AutoPropagation",
    "BlockPropagation",
    "MessagePassingPropagation",
    "Propagate",
    "Propagation",
    "RealEdges",
    "SparsePropagation",
    "States",
    "WeightedSum",
    "make_propagation",
]

PROPAGATIONS: dict[str, type[Propagation]] = {
    "auto": AutoPropagation,
    "block": BlockPropagation,
    "message_passing": MessagePassingPropagation,
    "sparse": SparsePropagation,
}


def make_propagation(propagation: str | Propagation) -> Propagation:
    """Return a new propagation object, see ``dnw_graph.registry.resolve``."""
    return resolve("propagation", propagation, Propagation, PROPAGATIONS)


def __getattr__(name: str) -> Any:
    """Import the part that needs PyG on first use."""
    if name == "WeightedSum":
        from dnw_graph.propagation.weighted_sum import WeightedSum

        return WeightedSum
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
