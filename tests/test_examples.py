import re
import runpy
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
