"""Names and objects as arguments: a string picks a default, an object carries options."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from dnw_graph.errors import InputError, unknown_name

T = TypeVar("T")


def resolve(kind: str, given: object, base: type[T], known: Mapping[str, type[T]]) -> T:
    """Return an object of its own for one graph, from a name or from an object that is copied.

    Args:
        kind: What it is, for messages.
        given: A name, or an object of class ``base``.
        base: The class that objects must have.
        known: The names that exist.

    Raises:
        InputError: If the name is unknown or the object of another class.
    """
    if isinstance(given, base):
        return copy.deepcopy(given)
    if not isinstance(given, str):
        raise InputError(f"a {kind} is a name or a {base.__name__} object; got {given!r}")
    if given not in known:
        raise unknown_name(kind, given, known)
    return known[given]()
