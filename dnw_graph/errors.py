"""Errors that a user can cause and mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something given by the user cannot be used.

    The message is one line that says what was given, what was expected and how to get there. Command lines print
    it without a traceback and exit with status 2.
    """


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Return the error for a name that is not in a registry, with the names that come near.

    Args:
        kind: What the name stands for, for example ``"wiring"``.
        name: The name that was given.
        known: The names that exist.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return InputError(f"unknown {kind} {name!r}: {hint}known are {', '.join(map(repr, known))}")
