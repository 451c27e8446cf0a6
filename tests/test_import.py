import subprocess
import sys
from pathlib import Path

import pytest

import dnw_graph

HEAVY = ("lightning", "pytorch_lightning", "matplotlib", "torchdata", "jsonargparse", "torchmetrics", "sklearn")


def test_importing_the_package_pulls_in_no_training_packages():
    program = f"import sys, dnw_graph, dnw_graph.models; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=Path(dnw_graph.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_a_program_can_prepare_for_signals_before_the_imports_that_take_seconds():
    program = "import sys; from dnw_graph import stopping; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(dnw_graph.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_public_names():
    for name in dnw_graph.__all__:
        assert getattr(dnw_graph, name).__doc__, name
    assert {*dnw_graph.__all__} <= {*dir(dnw_graph)}
    assert dnw_graph.wirings.DNW is dnw_graph.DNW
    with pytest.raises(AttributeError, match="has no attribute 'NeuralGraf'"):
        dnw_graph.NeuralGraf  # noqa: B018
