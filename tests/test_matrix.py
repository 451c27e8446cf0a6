"""What the matrix installs. The matrix itself runs by hand (``make test-matrix``): each version takes minutes."""

import argparse
import sys

import matrix
import pytest


@pytest.mark.parametrize(
    ("wanted", "torch", "pyg"),
    [
        ("2.8", "torch==2.8.*", "torch-geometric==2.7.*"),
        ("2.8.1", "torch==2.8.1", "torch-geometric==2.7.*"),
        ("2.11", "torch==2.11.*", "torch-geometric"),
        ("newest", "torch", "torch-geometric"),
    ],
)
def test_the_wanted_pytorch_takes_the_place_of_the_supported_ones(wanted, torch, pyg):
    requirements = matrix.requirements(wanted)
    assert requirements[:3] == [torch, "torchvision", pyg]
    assert (
        sum(line.startswith(("torch=", "torch>", "torchvision", "torch-geometric")) for line in requirements[1:]) == 2
    )
    assert {"torchdiffeq", "lightning", "pytest"} < {line.split(">")[0] for line in requirements}


@pytest.mark.parametrize("wanted", ["", "2", "2.x", "latest", "2.8 2.11", ">=2.8"])
def test_what_is_no_version_is_refused(wanted):
    with pytest.raises(argparse.ArgumentTypeError, match=r'expected a release like 2.11 or 2.14.1, or "newest"'):
        matrix.version(wanted)


def test_a_command_gives_its_exit_code_and_last_line(capfd):
    code, line = matrix.run([sys.executable, "-c", "import os; print(1); print(os.environ['A']); exit(3)"], A="last")
    assert (code, line) == (3, "last")
    assert capfd.readouterr().out == "1\nlast\n"


def test_a_version_that_fails_is_told_after_the_others_and_by_the_exit_code(monkeypatch, capsys, tmp_path):
    lines = iter(["installed", "5 passed in 1s", "installed", "1 failed, 4 passed in 1s", "no matching distribution"])
    codes = iter([0, 0, 0, 1, 1])
    monkeypatch.setattr(sys, "argv", ["matrix.py", "2.8", "2.11", "9.9", "--keep", str(tmp_path)])
    monkeypatch.setattr(matrix, "environment", lambda folder: folder.name)
    monkeypatch.setattr(matrix, "versions", lambda python: [python, "0.1", "2.7"])
    monkeypatch.setattr(matrix, "run", lambda command, **variables: (next(codes), next(lines)))
    assert matrix.main() == 1
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert table == [
        ["passed", "2.8", "0.1", "2.7", "5", "passed", "in", "1s"],
        ["FAILED", "2.11", "0.1", "2.7", "1", "failed,", "4", "passed", "in", "1s"],
        ["FAILED", "9.9", "no", "matching", "distribution"],
    ]
