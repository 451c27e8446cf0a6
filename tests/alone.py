"""Programs in a process of their own: a compiler cannot look through the type checks that tests run under."""

import os
import subprocess
import sys
from pathlib import Path


def run_alone(program):
    """What a program leaves: ``stdout`` and ``stderr`` as text."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
