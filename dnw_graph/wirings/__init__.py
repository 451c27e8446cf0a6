"""Rules that choose the real edges of a graph, one per file."""

from __future__ import annotations

from typing import Any

from dnw_graph.arguments import checked
from dnw_graph.registry import build, resolve
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.complete import Complete
from dnw_graph.wirings.dnw import DNW
from dnw_graph.wirings.fine_tune import FineTune
from dnw_graph.wirings.fixed import Fixed
from dnw_graph.wirings.l1_anneal import L1Anneal
from dnw_graph.wirings.lottery_ticket import LotteryTicket
from dnw_graph.wirings.no_update import NoUpdate
from dnw_graph.wirings.random_graph import RandomGraph
from dnw_graph.wirings.schedule import Schedule, Scheduled
from dnw_graph.wirings.targeted_dropout import TargetedDropout

__all__ = [
    "DNW",
    "WIRINGS",
    "Complete",
    "FineTune",
    "Fixed",
    "L1Anneal",
    "LotteryTicket",
    "NoUpdate",
    "RandomGraph",
    "Schedule",
    "Scheduled",
    "TargetedDropout",
    "Wiring",
    "create_wiring",
    "make_wiring",
]

WIRINGS: dict[str, type[Wiring]] = {
    "complete": Complete,
    "dnw": DNW,
    "fine_tune": FineTune,
    "l1_anneal": L1Anneal,
    "lottery_ticket": LotteryTicket,
    "no_update": NoUpdate,
    "random_graph": RandomGraph,
    "targeted_dropout": TargetedDropout,
}


def make_wiring(wiring: str | Wiring) -> Wiring:
    """Return a wiring of its own for one graph, see ``dnw_graph.registry.resolve``."""
    return resolve("wiring", wiring, Wiring, WIRINGS)


@checked
def create_wiring(name: str, **options: Any) -> Wiring:
    """Return a wiring by name, with options.

    Args:
        name: One of ``WIRINGS``.
        options: Arguments of its class.

    Raises:
        InputError: If the name or an option is unknown, or an option cannot be used.
    """
    return build("wiring", name, WIRINGS, options)
