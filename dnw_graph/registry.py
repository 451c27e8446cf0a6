"""Arguments that are names or objects: a name stands for an object with default options."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dnw_graph.errors import InputError, unknown_name

T = TypeVar("T")


def resolve(kind: str, given: object, base: type[T], known: Mapping[str, type[T]]) -> T:
    """Instantiate by name, or deep-copy the given object.

    Args:
        kind: What the argument is, for messages.
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
    return build(kind, given, known, {})


def build(kind: str, name: str, known: Mapping[str, Callable[..., T]], options: Mapping[str, Any]) -> T:
    """Return an object by name, created with options.

    Args:
        kind: What the argument is, for messages.
        name: One of ``known``.
        known: The known names, with functions that create their objects.
        options: Arguments by name.

    Raises:
        InputError: If the name or an option is unknown, or a required option is missing.
    """
    if not isinstance(name, str) or name not in known:
        raise unknown_name(kind, name, known)
    parameters = inspect.signature(known[name]).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    arguments = [p.name for p in named]
    for option in options:
        if not arguments:
            raise InputError(f"{kind} {name!r} has no options; got {option!r}")
        if option not in arguments:
            raise unknown_name(f"option of {kind} {name!r}", option, arguments)
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in options:
            option = parameter.name
            raise InputError(
                f"{kind} {name!r} needs the option {option!r}, which was not given: use create_{kind}(…, {option}=…), "
                f"or --{kind}-options.{option} on a command line"
            )
    return known[name](**options)
