"""Rules that choose the real edges of a graph, one per file."""

from __future__ import annotations

from dnw_graph.registry import resolve
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.dnw import DNW
from dnw_graph.wirings.fixed import Fixed
from dnw_graph.wirings.random_graph import RandomGraph

__all__ = ["DNW", "WIRINGS", "Fixed", "RandomGraph", "Wiring", "make_wiring"]

WIRINGS: dict[str, type[Wiring]] = {"dnw": DNW, "random_graph": RandomGraph}


def make_wiring(wiring: str | Wiring) -> Wiring:
    """Return a wiring of its own for one graph, see ``dnw_graph.registry.resolve``."""
    return resolve("wiring", wiring, Wiring, WIRINGS)
