"""How the states of a graph follow from one another."""

from __future__ import annotations

from dnw_graph.dynamics.continuous import Continuous
from dnw_graph.dynamics.discrete import Discrete
from dnw_graph.dynamics.dynamics import Dynamics
from dnw_graph.dynamics.recurrent import Recurrent
from dnw_graph.dynamics.static import Static
from dnw_graph.errors import InputError
from dnw_graph.registry import resolve

__all__ = ["DYNAMICS", "Continuous", "Discrete", "Dynamics", "Recurrent", "Static", "make_dynamics"]

DYNAMICS: dict[str, type[Dynamics]] = {"static": Static, "continuous": Continuous}


def make_dynamics(dynamics: str | Dynamics) -> Dynamics:
    """Return a dynamics of its own for one graph, see ``dnw_graph.registry.resolve``."""
    if dynamics == "discrete":
        raise InputError("a discrete graph has a number of steps: give dynamics=Discrete(steps=…) instead of its name")
    return resolve("dynamics", dynamics, Dynamics, DYNAMICS)
