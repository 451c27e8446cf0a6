"""Rules that choose the real edges of a graph, one per file."""

from __future__ import annotations

import copy

from dnw_graph.errors import InputError, unknown_name
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.dnw import DNW
from dnw_graph.wirings.fixed import Fixed
from dnw_graph.wirings.random_graph import RandomGraph

__all__ = ["DNW", "WIRINGS", "Fixed", "RandomGraph", "Wiring", "make_wiring"]

WIRINGS: dict[str, type[Wiring]] = {"dnw": DNW, "random_graph": RandomGraph}


def make_wiring(wiring: str | Wiring) -> Wiring:
    """Return a wiring of its own for one graph, from a name or from an object that is copied.

    Raises:
        InputError: If the name is unknown or the object is no :class:`Wiring`.
    """
    if isinstance(wiring, Wiring):
        return copy.deepcopy(wiring)
    if not isinstance(wiring, str):
        raise InputError(f"a wiring is a name or a Wiring object; got {wiring!r}")
    if wiring not in WIRINGS:
        raise unknown_name("wiring", wiring, WIRINGS)
    return WIRINGS[wiring]()
