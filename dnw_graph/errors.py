"""Errors that a user can cause and mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 499


class InputError(ValueError):
    """Something given by the user cannot be used.

    The message is one line of less than 500 characters that says what was given, what was expected and how to get
    there. Line breaks and other unprintable characters, such as those in the name of a file, are escaped, and a longer
    message is cut in its middle. Command lines print it without a traceback and exit with status 2.

    Args:
        message: The message. Of an error from a worker process of a DataLoader, which comes with its traceback, the
            last line is taken.
    """

    def __init__(self, message: str) -> None:
        if "Traceback (most recent call last)" in message:
            own = f"{InputError.__module__}.{InputError.__qualname__}: "
            message = message.strip().splitlines()[-1].removeprefix(own)
        super().__init__(_cut("".join(map(_printable, message.strip()))))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _cut(message: str) -> str:
    if len(message) <= LONGEST:
        return message
    tail = LONGEST // 3
    return f"{message[: LONGEST - tail - 3]} … {message[-tail:]}"


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
