"""The C++ kernels: compiled for this machine when they are first needed, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

from dnw_graph.ops.signatures import symbols

SOURCES = Path(__file__).with_name("kernels")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno")
SYMBOLS = tuple(symbols())
LONGEST = 600  # Seconds that a compiler may take.


def kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where PyTorch's own operations have to do.

    They are compiled by the first call that needs them, with ``$CXX`` or else ``c++``, ``g++`` or ``clang++``, which
    takes seconds, and kept in ``$XDG_CACHE_HOME/dnw_graph`` (default ``~/.cache/dnw_graph``) under a name that says for
    which source, compiler and processor, and what the file contains. Only files of the user's own, in a directory that
    nobody else can write to, are loaded. Whatever goes wrong, a warning says so once.

    In the environment, ``DNW_GRAPH_KERNELS=0`` switches the kernels off, and ``DNW_GRAPH_CXXFLAGS`` holds further flags
    for the compiler, such as ``-fsanitize=address``.
    """
    return None if os.environ.get("DNW_GRAPH_KERNELS") == "0" else _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        return _built()
    except Exception as error:  # Nothing that a machine lacks may end a forward pass.
        reason = str(error) or type(error).__name__
        if isinstance(error, subprocess.CalledProcessError):
            printed = error.stderr.decode(errors="replace").splitlines()
            lines = [line for line in printed if "error" in line] or printed[-1:]
            reason = f"{shlex.join(error.cmd[:1])} failed{': ' if lines else ''}{''.join(lines[:1])}"
        warnings.warn(
            f"the CPU kernels of dnw_graph could not be built, so slower PyTorch operations take their place: "
            f"{' '.join(reason.split())[:300]} (DNW_GRAPH_KERNELS=0 turns the kernels and this warning off)",
            stacklevel=3,
        )
        return None


def _built() -> ctypes.CDLL:
    """Return the library for this source, compiler and processor, compiled unless it is there."""
    from dnw_graph.ops.cache import open_cache  # It needs what only Unix has.

    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        raise OSError("no C++ compiler found as c++, g++, clang++ or $CXX")
    compiler = shlex.split(found)
    extra = shlex.split(os.environ.get("DNW_GRAPH_CXXFLAGS", ""))
    flags = [*FLAGS, *extra]
    # The compiler's predefined macros name its version and what the processor can do.
    macros = _output([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    sources = [path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*"))]
    key = hashlib.sha256(b"\n".join([*sources, *map(os.fsencode, flags), macros])).hexdigest()[:16]
    with open_cache() as cache:
        path = cache.find(f"kernels-{key}")
        if path is None:
            with cache.workplace() as directory:
                compiled, linked = Path(directory, "kernels.o"), Path(directory, "kernels.so")
                _output([*compiler, *flags, "-c", str(SOURCES / "kernels.cpp"), "-o", str(compiled)])
                # Linked without OpenMP: its functions are those that PyTorch has loaded, so that there is one thread
                # pool.
                _output([*compiler, *extra, "-shared", str(compiled), "-o", str(linked)])
                path = cache.keep(linked, f"kernels-{key}")
        library = ctypes.CDLL(str(path))
    missing = [name for name in SYMBOLS if not hasattr(library, name)]
    if missing:
        raise OSError(f"the compiled library lacks {missing[0]}")
    return library


def _output(command: Sequence[str]) -> bytes:
    """Return what a compiler prints; its messages are to be in English, whatever the user's language."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, check=True, capture_output=True, env=environment, timeout=LONGEST).stdout
