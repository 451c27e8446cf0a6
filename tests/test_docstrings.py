"""The examples in docstrings run as they stand: what a reader pastes into a fresh session works."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import dnw_graph
from dnw_graph.models import MODELS
from dnw_graph.wirings import WIRINGS

FOLDER = Path(dnw_graph.__file__).parent
PATHS = [path for path in sorted(FOLDER.rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_examples_run(path):
    module = importlib.import_module(".".join(path.relative_to(FOLDER.parent).with_suffix("").parts))
    runner, report = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST), []
    # Without the names of its module: an example imports what it uses.
    for example in doctest.DocTestFinder().find(module, globs={}):
        runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)
    assert runner.tries == path.read_text().count(">>> ")


def test_every_rule_and_model_names_its_paper():
    for thing in [*WIRINGS.values(), *MODELS.values()]:
        assert re.search(r"arXiv \d{4}\.\d{5}", thing.__doc__), thing


def test_examples_have_the_title_that_the_documentation_shows_as_code():
    assert len(PATHS) >= 8
    for path in PATHS:
        assert ">>> " not in path.read_text().split("    Examples:\n        >>> ")[0], path
