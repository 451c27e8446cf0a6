"""The training script of the page on sparse training: as it was, and with its two lines more."""

import re
from pathlib import Path

import pytest
from pairs import rest_is_slow

PAGE = Path(__file__).parents[2] / "docs" / "sparsify.md"


def scripts():
    (diff,) = re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = diff.splitlines()
    return "\n".join(line[1:] for line in lines if not line.startswith("+")), "\n".join(line[1:] for line in lines)


def test_two_lines_more():
    plain, sparse = (script.splitlines() for script in scripts())
    assert len(sparse) == len(plain) + 2


@pytest.mark.parametrize("number", rest_is_slow([0, 1]), ids=["dense", "sparse"])
def test_the_script_trains(number, capsys):
    variables = {}
    exec(compile(scripts()[number], PAGE.name, "exec"), variables)
    assert variables["right"] > 0.6
    assert ("heads.head.weight" in capsys.readouterr().out) == bool(number)
    share = [p.count_nonzero() / p.numel() for p in [variables["model"].heads.head.weight]]
    assert share[0] == pytest.approx(0.2 if number else 1.0, abs=0.01)
