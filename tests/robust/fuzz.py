"""Random and hostile input for every public door: of so many calls, which ended in neither a result nor one clear line.

The quick form runs in the slow tests (``test_fuzz.py``). The long form, by hand:

    python tests/robust/fuzz.py --surfaces api files --count 15000 --seed 1

A case is bad if it ends in anything but a result or an ``InputError`` of one line under 500 characters: a raw error
from deep inside, nonsense that is accepted, a crash, wrong numbers. A seed gives the same cases on every machine.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from dnw_graph import InputError

# Modules beside this one. Each has ``cases(rng, count)``, which yields so many (description, callable) pairs. The
# callable returns when all is well, raises InputError for a refusal, and raises Bad for what must not happen.
SURFACES = ("api", "operators", "files", "commands")
FORKED = ("api", "operators")  # Their cases may crash or hang: they run in a child, and another one goes on after it.
SECONDS = 60  # for a case there
LONGEST = 500
Case = tuple[str, Callable[[], object]]


class Bad(Exception):  # noqa: N818
    """What a case found that is neither a result nor a refusal."""


def verdict(call: Callable[[], object]) -> str | None:
    """Make a call and return what is bad about how it ended, or None."""
    try:
        call()
    except InputError as error:
        message = str(error)
        if "\n" in message.strip() or not 0 < len(message) < LONGEST:
            return f"a message of {len(message)} characters and {message.count(chr(10)) + 1} lines"
    except Bad as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return None


def fuzz(surface: str, count: int, seed: int) -> tuple[int, dict[str, str]]:
    """Try a surface.

    Args:
        surface: One of ``SURFACES``.
        count: Number of cases.
        seed: What the cases are drawn from.

    Returns:
        How many were tried, and what was bad about each bad one, by description.
    """
    cases = importlib.import_module(surface).cases(random.Random(f"{surface} {seed}"), count)
    endings = _in_children(cases) if surface in FORKED else ((what, verdict(call)) for what, call in cases)
    tried, bad = 0, {}
    for tried, (what, reason) in enumerate(endings, 1):
        if reason is not None:
            bad[f"{tried}: {what}"] = reason
    return tried, bad


def _in_children(cases: Iterator[Case]) -> Iterator[tuple[str, str | None]]:
    context = multiprocessing.get_context("fork")
    status = None
    while status != 0:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_send_verdicts, args=(cases, theirs))
        child.start()
        theirs.close()
        with suppress(EOFError):
            while True:
                reason = ours.recv()
                yield next(cases)[0], reason
        child.join()
        status = child.exitcode
        if status:
            ending = (
                f"takes more than {SECONDS} s"
                if status == -signal.SIGALRM
                else f"the process ends with status {status}"
            )
            yield next(cases)[0], ending


def _send_verdicts(cases: Iterator[Case], to: Connection) -> None:
    for _, call in cases:
        signal.alarm(SECONDS)  # kills the child, whatever holds it
        to.send(verdict(call))


def main() -> int:
    """Print tried and bad of every surface, the kinds of the bad ones, and examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surfaces", nargs="+", choices=SURFACES, default=SURFACES)
    parser.add_argument("--count", type=int, default=2000, help="cases of each surface")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=10, help="bad cases to show of each surface")
    options = parser.parse_args()
    total = 0
    for surface in options.surfaces:
        tried, bad = fuzz(surface, options.count, options.seed)
        total += len(bad)
        print(f"{surface}: {tried:,} tried, {len(bad):,} bad", flush=True)
        for kind, number in Counter(reason[:60] for reason in bad.values()).most_common(options.examples):
            print(f"  {number:6,}  {kind}")
        for description, reason in list(bad.items())[: options.examples]:
            print(f"  {description}\n      {reason}")
    return 1 if total else 0


if __name__ == "__main__":
    # Surfaces import this module by its name: run that one, so that there is one ``Bad``.
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(importlib.import_module("fuzz").main())
