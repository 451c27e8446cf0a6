"""Rules that choose the real edges of a graph, one per file."""

from __future__ import annotations

import importlib
from typing import Any

from dnw_graph.arguments import checked, require
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.registry import build, resolve
from dnw_graph.wirings.ac_dc import ACDC
from dnw_graph.wirings.base import Wiring
from dnw_graph.wirings.complete import Complete
from dnw_graph.wirings.dnw import DNW
from dnw_graph.wirings.fixed import Fixed
from dnw_graph.wirings.gmp import GMP
from dnw_graph.wirings.l1_anneal import L1Anneal
from dnw_graph.wirings.nm import NM
from dnw_graph.wirings.no_update import NoUpdate
from dnw_graph.wirings.random_graph import RandomGraph
from dnw_graph.wirings.rigl import RigL
from dnw_graph.wirings.schedule import Schedule
from dnw_graph.wirings.soft_threshold import STR
from dnw_graph.wirings.sparse_evolution import SET
from dnw_graph.wirings.sparse_momentum import SparseMomentum
from dnw_graph.wirings.targeted_dropout import TargetedDropout
from dnw_graph.wirings.top_kast import TopKAST
from dnw_graph.wirings.two_stage import FineTune, LotteryTicket
from dnw_graph.wirings.view import View

__all__ = [
    "ACDC",
    "DNW",
    "GMP",
    "NM",
    "SET",
    "STR",
    "WIRINGS",
    "Complete",
    "FineTune",
    "Fixed",
    "L1Anneal",
    "LotteryTicket",
    "NoUpdate",
    "RandomGraph",
    "RigL",
    "Schedule",
    "SparseMomentum",
    "TargetedDropout",
    "TopKAST",
    "View",
    "Wiring",
    "create_wiring",
    "make_wiring",
    "register_wiring",
    "wiring_name",
    "wiring_names",
]

WIRINGS: dict[str, type[Wiring]] = {
    "ac_dc": ACDC,
    "complete": Complete,
    "dnw": DNW,
    "fine_tune": FineTune,
    "gmp": GMP,
    "l1_anneal": L1Anneal,
    "lottery_ticket": LotteryTicket,
    "nm": NM,
    "no_update": NoUpdate,
    "random_graph": RandomGraph,
    "rigl": RigL,
    "set": SET,
    "sparse_momentum": SparseMomentum,
    "str": STR,
    "targeted_dropout": TargetedDropout,
    "top_kast": TopKAST,
}
"""The rules by name."""


@checked
def register_wiring(name: str, rule: type[Wiring]) -> None:
    """Register a rule under a name, for graphs, command lines, YAML files and tables.

    Args:
        name: The name.
        rule: The class.

    Raises:
        InputError: If another rule has the name, or it is empty or cannot be printed.
    """
    require(name.isprintable() and name.strip() != "", "name", "a name on one line", name)
    if WIRINGS.setdefault(name, rule) is not rule:
        raise InputError(f"the wiring {name!r} is {WIRINGS[name].__qualname__} already: choose another name")


def wiring_name(rule: type[Wiring]) -> str:
    """Return the name of a rule: the one it is registered under, or ``package.module.Class``."""
    return wiring_names(rule)[0]


def wiring_names(rule: type[Wiring]) -> list[str]:
    """Return all names of a rule: those it is registered under, and ``package.module.Class``."""
    return [*(name for name, known in WIRINGS.items() if known is rule), f"{rule.__module__}.{rule.__qualname__}"]


def make_wiring(wiring: str | Wiring) -> Wiring:
    """Return a new wiring object, from a name, ``package.module.Class`` or an object to copy."""
    return resolve("wiring", wiring, Wiring, _known(wiring))


@checked
def create_wiring(name: str, **options: Any) -> Wiring:
    """Return a wiring by name, with options.

    Args:
        name: One of ``WIRINGS``, or ``package.module.Class``.
        options: Arguments of its class.

    Raises:
        InputError: If the name or an option is unknown, or an option cannot be used.
    """
    return build("wiring", name, _known(name), options)


def budget(wiring: str | Wiring, num_edges: int) -> int | None:
    """Return the number of edges to ask a graph for, or None if the rule determines it, as ``"nm"`` does."""
    rule = wiring if isinstance(wiring, Wiring) else make_wiring(wiring)
    return None if rule.decides_k else num_edges


def _known(name: object) -> dict[str, type[Wiring]]:
    """Return the rules by name, including the class of the given name if that is ``package.module.Class``."""
    if not isinstance(name, str) or name in WIRINGS or "." not in name:
        return WIRINGS
    module, _, rule = name.rpartition(".")
    try:
        home = importlib.import_module(module)
    except (ImportError, TypeError, ValueError) as error:  # TypeError: a relative name
        raise InputError(f"wiring {name!r} cannot be imported as package.module.Class: {error}") from error
    found = getattr(home, rule, None)
    if found is None:
        there = [f"{module}.{each}" for each, value in vars(home).items() if _is_rule(value)]
        raise unknown_name("wiring", name, there or WIRINGS)
    if not _is_rule(found):
        raise InputError(f"wiring {name!r} is not a subclass of dnw_graph.Wiring; got {found!r}")
    return {**WIRINGS, name: found}


def _is_rule(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Wiring)
