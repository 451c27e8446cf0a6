"""The numbers of real edges over time, against what the rules are defined to have."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dnw_graph.wirings import WIRINGS

ROOT = Path(__file__).parents[2]
N, K, STEPS = 512, 160, 6


@pytest.fixture(scope="module")
def script() -> ModuleType:
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return __import__("rules_over_time")
    finally:
        sys.path.remove(folder)


def cubic(step: int) -> int:
    return round(N - (N - K) * (1 - (1 - min(step / (0.75 * STEPS), 1)) ** 3))


COUNTS = {
    "complete": [N] * 7,
    "fine_tune": [N] * 3 + [K] * 4,
    "gmp": [cubic(step) for step in range(7)],
    "rigl": [K] * 7,
    "nm": [N // 2] * 7,
}


@pytest.mark.parametrize("rule", COUNTS)
def test_counts_are_those_of_the_definition(script: ModuleType, rule: str) -> None:
    expected = dict(zip(map(str, range(7)), COUNTS[rule], strict=True))
    assert script.row(rule, "graph", STEPS) == {"rule": rule, "model": "graph", **expected}


@pytest.mark.slow
def test_every_rule_is_in_the_table_and_on_the_page(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rules_over_time.py", "--steps", "6", "--json", str(tmp_path / "rows.json")])
    script.main()
    every = [(rule, model) for model in ("graph", "perceptron") for rule in sorted(WIRINGS)]
    for text in (capsys.readouterr().out, (ROOT / "docs" / "rules.md").read_text()):
        assert re.findall(r"^\| (\w+) +\| (graph|perceptron) +\|", text, re.MULTILINE) == every
    assert [(row["rule"], row["model"]) for row in json.loads((tmp_path / "rows.json").read_text())] == every
