"""Compiles the C++ kernels for this machine on first use, and stores them in the user's cache."""

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
LONGEST = 600  # Time limit for the compiler, in seconds.


def kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None if PyTorch's own operations must be used instead.

    The first call compiles them with ``$CXX`` or else ``c++``, ``g++`` or ``clang++``, which takes seconds. They are
    stored in ``$XDG_CACHE_HOME/dnw_graph`` (default ``~/.cache/dnw_graph``), under a name with hashes of source,
    compiler, processor and content. Only the user's files, in a directory that nobody else can write to, are loaded.
    If anything fails, a warning is shown once.

    The environment variable ``DNW_GRAPH_KERNELS=0`` disables the kernels; ``DNW_GRAPH_CXXFLAGS`` adds compiler flags,
    such as ``-fsanitize=address``.
    """
    return None if os.environ.get("DNW_GRAPH_KERNELS") == "0" else _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        return _built()
    except Exception as error:  # A forward pass must work without the kernels.
        reason = str(error) or type(error).__name__
        if isinstance(error, subprocess.CalledProcessError):
            printed = error.stderr.decode(errors="replace").splitlines()
            lines = [line for line in printed if "error" in line] or printed[-1:]
            reason = f"{shlex.join(error.cmd[:1])} failed{': ' if lines else ''}{''.join(lines[:1])}"
        warnings.warn(
            f"the CPU kernels of dnw_graph could not be built, so slower PyTorch operations replace them: "
            f"{' '.join(reason.split())[:300]} (DNW_GRAPH_KERNELS=0 turns the kernels and this warning off)",
            stacklevel=3,
        )
        return None


def _built() -> ctypes.CDLL:
    """Return the library for this source, compiler and processor; compile it if it is not in the cache."""
    from dnw_graph.ops.cache import open_cache  # Imports modules that exist on Unix only.

    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        raise OSError("no C++ compiler found as c++, g++, clang++ or $CXX")
    compiler = shlex.split(found)
    extra = shlex.split(os.environ.get("DNW_GRAPH_CXXFLAGS", ""))
    flags = [*FLAGS, *extra]
    # The compiler's predefined macros include its version and the processor's instruction sets.
    macros = _output([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    sources = [path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*"))]
    key = hashlib.sha256(b"\n".join([*sources, *map(os.fsencode, flags), macros])).hexdigest()[:16]
    with open_cache() as cache:
        path = cache.find(f"kernels-{key}")
        if path is None:
            with cache.workplace() as directory:
                compiled, linked = Path(directory, "kernels.o"), Path(directory, "kernels.so")
                _output([*compiler, *flags, "-c", str(SOURCES / "kernels.cpp"), "-o", str(compiled)])
                # Not linked with OpenMP: the kernels use the library that PyTorch has loaded, so that there is one
                # thread pool.
                _output([*compiler, *extra, "-shared", str(compiled), "-o", str(linked)])
                path = cache.keep(linked, f"kernels-{key}")
        library = ctypes.CDLL(str(path))
    missing = [name for name in SYMBOLS if not hasattr(library, name)]
    if missing:
        raise OSError(f"the compiled library lacks {missing[0]}")
    return library


def _output(command: Sequence[str]) -> bytes:
    """Return the output of a compiler, run with English messages."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, check=True, capture_output=True, env=environment, timeout=LONGEST).stdout
