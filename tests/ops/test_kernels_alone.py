"""The kernels in a program of their own, ``kernels_alone.cpp``: here, and on an aarch64 that QEMU emulates."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dnw_graph.ops.build import FLAGS, SOURCES

pytestmark = pytest.mark.slow  # A compiler takes half a minute.
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def results(program, compiler, *flags, emulator=()):
    """Compile and run; the lines that are printed."""
    own = [flag for flag in FLAGS if flag not in ("-march=native", "-fPIC")]
    source = Path(__file__).with_name("kernels_alone.cpp")
    command = [*shlex.split(compiler), *own, *flags, f"-I{SOURCES}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def kernels_in(lines):
    return {line.split()[0].rstrip(",") for line in lines[:-1]}


@pytest.mark.parametrize("flags", [["-march=native"], []], ids=["this processor", "any processor of its kind"])
def test_here(tmp_path, has_compiler, flags):
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")))
    lines = results(tmp_path / "program", compiler, *flags)
    assert lines[-1] == "0 wrong"
    assert kernels_in(lines) == {
        "exchanged",
        "largest",
        "node_function",
        "node_function_grad",
        "sampled_linear",
        "sampled_product",
        "sparse_convolution",
        "sparse_convolution_grad",
        "sparse_linear",
        "sparse_product",
        "static_graph",
    }


def test_aarch64(tmp_path):
    missing = [each for each in (COMPILER, EMULATOR) if shutil.which(each) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}")
    lines = results(tmp_path / "program", COMPILER, "-static", emulator=[EMULATOR])
    assert lines[-1] == "0 wrong"
