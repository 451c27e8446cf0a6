"""The C++ kernels: compiled for this machine when they are first needed, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dnw_graph.ops.checks import wrong_edges

SOURCES = Path(__file__).with_name("kernels")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno")
WRONG_EDGES = 1  # The kernels' status for an index out of range.
_Argument = int | float | Sequence[int] | Tensor | None


def kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where PyTorch's own operations have to do.

    They are compiled by the first call that needs them, with ``$CXX`` or else ``c++``, ``g++`` or ``clang++``, which
    takes seconds, and kept in ``$XDG_CACHE_HOME/dnw_graph`` (default ``~/.cache/dnw_graph``) under a name that says for
    which source, compiler and processor. Without a compiler a warning says so once. ``DNW_GRAPH_KERNELS=0`` in the
    environment switches the kernels off.
    """
    return None if os.environ.get("DNW_GRAPH_KERNELS") == "0" else _load()


def run(library: ctypes.CDLL, name: str, types: Sequence[torch.dtype], *arguments: _Argument) -> None:
    """Call a kernel with as many threads as PyTorch uses.

    Args:
        library: The compiled kernels.
        name: Name of the kernel without its types.
        types: The types that it is compiled for.
        arguments: What the kernel takes after the number of threads; tensors must be contiguous.

    Raises:
        InputError: If the kernel finds an index out of range.
    """
    function = getattr(library, "_".join([name, *map(str, types)]).replace("torch.", ""))
    status = function(*map(_as_c, (torch.get_num_threads(), *arguments)))
    if status == WRONG_EDGES:
        raise wrong_edges()
    if status:
        raise MemoryError(f"not enough memory for {name}")


def _as_c(argument: _Argument) -> ctypes.c_int64 | ctypes.c_double | ctypes.c_void_p | ctypes.Array:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return (ctypes.c_int64 * len(argument))(*argument)


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_build()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(error)
        if isinstance(error, subprocess.CalledProcessError):
            lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()[-1:]
            reason = f"{shlex.join(error.cmd[:1])} failed{': ' if lines else ''}{''.join(lines[:1])}"
        warnings.warn(
            f"the CPU kernels of dnw_graph could not be built, so slower PyTorch operations take their place: {reason} "
            "(DNW_GRAPH_KERNELS=0 turns the kernels and this warning off)",
            stacklevel=2,
        )
        return None


def _build() -> Path:
    """Return the library for this source, compiler and processor, compiled unless it is there."""
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        raise OSError("no C++ compiler found as c++, g++, clang++ or $CXX")
    compiler = shlex.split(found)
    # The compiler's predefined macros name its version and what the processor can do.
    macros = _output([*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    sources = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    key = hashlib.sha256("\n".join([*sources, *FLAGS, macros]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dnw_graph"
    library = cache / f"kernels-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            compiled, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
            _output([*compiler, *FLAGS, "-c", str(SOURCES / "kernels.cpp"), "-o", str(compiled)])
            # Linked without OpenMP: its functions are those that PyTorch has loaded, so that there is one thread pool.
            _output([*compiler, "-shared", str(compiled), "-o", str(linked)])
            linked.replace(library)
    return library


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
