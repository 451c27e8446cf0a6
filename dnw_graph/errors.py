"""Errors that users cause and can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 499


class InputError(ValueError):
    """A user's input cannot be used.

    The message is one line of less than 500 characters: what was given, what was expected, and how to fix it. Line
    breaks and other unprintable characters, for example in file names, are escaped, and longer messages are cut in the
    middle. Command lines print the message without a traceback and exit with status 2.

    Args:
        message: The message. If it has a traceback, as errors from DataLoader workers do, only the last line is used.
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
    """Return the error for an unknown name, with similar known names.

    Args:
        kind: The kind of thing named, for example ``"wiring"``.
        name: The unknown name.
        known: The known names.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return InputError(f"unknown {kind} {name!r}: {hint}known are {', '.join(map(repr, known))}")
