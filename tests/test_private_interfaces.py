"""Names that other packages keep to themselves stand in one module only, ``dnw_graph/_compat.py``."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOM = ROOT / "dnw_graph" / "_compat.py"
FILES = sorted(path for room in ("dnw_graph", "examples", "benchmarks") for path in (ROOT / room).rglob("*.py"))
# Public in spite of the underscore: of named tuples, and of os.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_replace"}
LOOKS = {"getattr", "hasattr", "setattr", "delattr", "attrgetter"}


def private(name):
    """Whether a dotted name has a part that its owner keeps to itself."""
    return any(part.startswith("_") and not (part.startswith("__") and part.endswith("__")) for part in name.split("."))


def made_here(tree):
    """The private names that a module gives to its own functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] * (ast.unparse(node.value) in ("self", "ctx"))


def foreign(tree, own):
    """Every use of a private name that is not one of ``own``: its line and the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if private(alias.name))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dnw_graph"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names if private(name) and node.module != "__future__")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in LOOKS:
            words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            yield from ((node.lineno, word) for word in words if private(word) and word not in own)


@pytest.fixture(scope="module")
def trees():
    return {path: ast.parse(path.read_text()) for path in FILES}


def test_no_other_module_names_what_another_package_keeps_to_itself(trees):
    own = DOCUMENTED | {name for tree in trees.values() for name in made_here(tree)}
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, tree in trees.items()
        if path != ROOM
        for line, name in foreign(tree, own)
    ]
    assert not found, f"use dnw_graph._compat, or a public name, instead of: {'; '.join(found)}"


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._current_graph_task_id()",
        "weight._version",
        "from torchdiffeq._impl.odeint import SOLVERS",
        "from torch.nn.modules.batchnorm import _NormBase",
        "import torch._dynamo",
        "getattr(module, '_is_replica', False)",
        "layer._parameters['weight'] = 1",
    ],
)
def test_the_check_finds_each_way_of_naming_one(line):
    assert list(foreign(ast.parse(line), own=set()))


def test_own_names_are_no_offence():
    tree = ast.parse("class A:\n    def __init__(self):\n        self._x = 1\ndef f(a):\n    return a._x, a.__class__")
    assert not list(foreign(tree, set(made_here(tree))))
