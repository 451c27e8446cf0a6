import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "surface", [name for name in ("api", "operators", "files", "commands") if (HERE / f"{name}.py").exists()]
)
def test_no_case_is_bad(surface, monkeypatch, unchecked):
    monkeypatch.syspath_prepend(str(HERE))
    fuzz = sys.modules.get("fuzz") or __import__("fuzz")
    tried, bad = fuzz.fuzz(surface, 300, seed=0)
    assert tried >= 300
    assert not bad
