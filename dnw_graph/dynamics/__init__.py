"""How the states of a graph follow from one another."""

from __future__ import annotations

import copy

from dnw_graph.dynamics.base import Dynamics
from dnw_graph.dynamics.continuous import Continuous
from dnw_graph.dynamics.discrete import Discrete
from dnw_graph.dynamics.recurrent import Recurrent
from dnw_graph.dynamics.static import Static
from dnw_graph.errors import InputError, unknown_name

__all__ = ["DYNAMICS", "Continuous", "Discrete", "Dynamics", "Recurrent", "Static", "make_dynamics"]

DYNAMICS: dict[str, type[Dynamics]] = {"static": Static, "discrete": Discrete, "continuous": Continuous}


def make_dynamics(dynamics: str | Dynamics) -> Dynamics:
    """Return a dynamics of its own for one graph, from a name or from an object that is copied.

    Raises:
        InputError: If the name is unknown or the object is no :class:`Dynamics`.
    """
    if isinstance(dynamics, Dynamics):
        return copy.deepcopy(dynamics)
    if not isinstance(dynamics, str):
        raise InputError(f"a dynamics is a name or a Dynamics object; got {dynamics!r}")
    if dynamics not in DYNAMICS:
        raise unknown_name("dynamics", dynamics, DYNAMICS)
    return DYNAMICS[dynamics]()
