"""Whether a module does what its class says."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, cast

from torch import nn

from dnw_graph._compat import has_own_hooks


def as_its_class(module: nn.Module) -> bool:
    """Return whether a module keeps the methods of its class, and nobody listens to its calls or changes them."""
    return keeps_methods(module) and not has_own_hooks(module)


def keeps_methods(module: nn.Module) -> bool:
    """Return whether nobody has put another function in the place of one of a module's methods, such as ``forward``.

    Libraries that offload, wrap or patch layers do that, on the object and not on its class.
    """
    return vars(module).keys().isdisjoint(_methods(cast(Hashable, type(module))))


@functools.cache
def _methods(kind: Any) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))
