import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def _default_dtype():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_default_dtype")
def test_equivalences(capsys):
    runpy.run_path(str(EXAMPLES / "equivalences.py"), run_name="__main__")
    printed = capsys.readouterr().out
    number = r"([0-9.]+e[+-][0-9]+)"
    pairs = re.findall(f"outputs differ by {number}, gradients by {number}", printed)
    assert len(pairs) == 3  # perceptron, static graph, LSTM
    assert all(float(difference) < 1e-6 for pair in pairs for difference in pair)
    moved, left = re.findall(f"moves by {number} and becomes.*up to {number}", printed, re.DOTALL)[0]
    assert float(moved) > 1e-4
    assert float(left) < 1e-6


@pytest.mark.parametrize("name", ["cifar10_tiny", "imagenet_mobilenet", "imagenet_resnet50"])
def test_signals_are_taken_before_the_imports_that_take_seconds(name):
    program = (
        "import runpy, sys\n"
        "from dnw_graph import stopping\n"
        "stopping.start = lambda: sys.exit(8 if 'torch' in sys.modules else 7)\n"
        f"runpy.run_path({str(EXAMPLES / f'{name}.py')!r}, run_name='__main__')\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=EXAMPLES.parent, check=False).returncode == 7
