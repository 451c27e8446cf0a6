"""The quick form of the fuzz; ``fuzz.py`` itself is the long one."""

import importlib
from pathlib import Path

import pytest

CASES = {"api": 400, "operators": 200, "files": 150, "commands": 60}


@pytest.mark.slow
@pytest.mark.parametrize("surface", CASES)
def test_no_case_is_bad(surface, monkeypatch, unchecked):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    tried, bad = importlib.import_module("fuzz").fuzz(surface, CASES[surface], seed=0)
    assert tried >= CASES[surface]
    assert not bad
