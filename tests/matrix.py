"""Run the tests under several versions of PyTorch, each in a virtual environment of its own, one after the other.

python tests/matrix.py 2.11 2.14.1 newest
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The last PyTorch that a release of PyG names as supported, for those releases that newer ones have left behind.
# torchvision needs no such list: each release requires one PyTorch exactly, so pip finds the one that belongs to it.
PYG = {(2, 6): "2.6.*", (2, 8): "2.7.*"}
MATRIX = ("torch", "torchvision", "torch-geometric")
# As in the Makefile.
WORKERS = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
PYTEST = ["pytest", "-q", "--color=no", "-p", "no:cacheprovider", *WORKERS]


def main() -> int:
    """Test every version that was asked for. Returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help='releases of PyTorch: "2.11", "2.14.1", "newest"', type=version)
    parser.add_argument("--slow", action="store_true", help="run the tests marked slow too")
    parser.add_argument("--keep", type=Path, help="a directory for the environments, which are kept there (6 GB each)")
    arguments = parser.parse_args()

    rows = []
    for wanted in arguments.versions:
        print(f"\n=== PyTorch {wanted} ===", flush=True)
        with tempfile.TemporaryDirectory(prefix="dnw-graph-matrix-") as scratch:
            python = environment((arguments.keep or Path(scratch)).resolve() / wanted)
            code, line = run([python, "-m", "pip", "install", "--upgrade", "--progress-bar=off", *requirements(wanted)])
            installed = versions(python) if code == 0 else [wanted, "", ""]
            if code == 0:
                tier = [] if arguments.slow else ["-m", "not slow"]
                code, line = run([python, "-m", *PYTEST, *tier], CHECK_SIGNATURES=str(int(arguments.slow)))
        rows.append(("passed" if code == 0 else "FAILED", *installed, line))

    print()
    for row in [("", *MATRIX, "closing line"), *rows]:
        print("{:7} {:14} {:12} {:16} {}".format(*row))
    return int(any(row[0] != "passed" for row in rows))


def version(text: str) -> str:
    """Check the version of an argument, before anything is installed."""
    if not re.fullmatch(r"newest|\d+\.\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f'expected a release like 2.11 or 2.14.1, or "newest", got "{text}"')
    return text


def environment(folder: Path) -> str:
    """Create a virtual environment and return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return str(folder / "bin" / "python")


def requirements(wanted: str) -> list[str]:
    """Everything that pyproject.toml asks for, with the wanted PyTorch in place of the supported ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["train"], *extras["dev"]]
    others = [line for line in asked if re.match(r"[\w-]+", line)[0] not in MATRIX]
    if wanted == "newest":
        return [*MATRIX, *others]
    major, minor, *patch = map(int, wanted.split("."))
    torch = wanted if patch else f"{wanted}.*"
    pyg = next((f"=={pyg}" for last, pyg in sorted(PYG.items()) if (major, minor) <= last), "")
    return [f"torch=={torch}", "torchvision", f"torch-geometric{pyg}", *others]


def versions(python: str) -> list[str]:
    """Return the versions that an environment has of the packages in MATRIX."""
    code = f"import importlib.metadata as m; print(*map(m.version, {MATRIX}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def run(command: list[str], **variables: str) -> tuple[int, str]:
    """Run a command on this checkout, print what it prints, and return its exit code and its last line."""
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    process = subprocess.Popen(
        command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return process.wait(), last


if __name__ == "__main__":
    sys.exit(main())
