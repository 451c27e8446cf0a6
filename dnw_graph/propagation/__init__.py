"""The product Z → I over the real edges: two implementations, one result."""

from __future__ import annotations

from dnw_graph.errors import InputError, unknown_name
from dnw_graph.propagation.auto import AutoPropagation
from dnw_graph.propagation.base import Propagate, Propagation, RealEdges
from dnw_graph.propagation.block import BlockPropagation
from dnw_graph.propagation.message_passing import MessagePassingPropagation, WeightedSum

__all__ = [
    "PROPAGATIONS",
    "AutoPropagation",
    "BlockPropagation",
    "MessagePassingPropagation",
    "Propagate",
    "Propagation",
    "RealEdges",
    "WeightedSum",
    "make_propagation",
]

PROPAGATIONS: dict[str, type[Propagation]] = {
    "auto": AutoPropagation,
    "block": BlockPropagation,
    "message_passing": MessagePassingPropagation,
}


def make_propagation(propagation: str | Propagation) -> Propagation:
    """Return a propagation from a name or an object.

    Args:
        propagation: ``"auto"``, ``"block"``, ``"message_passing"`` or an object.

    Raises:
        InputError: If the name is unknown or the object is no :class:`Propagation`.
    """
    if isinstance(propagation, Propagation):
        return propagation
    if not isinstance(propagation, str):
        raise InputError(f"a propagation is a name or a Propagation object; got {propagation!r}")
    if propagation not in PROPAGATIONS:
        raise unknown_name("propagation", propagation, PROPAGATIONS)
    return PROPAGATIONS[propagation]()
