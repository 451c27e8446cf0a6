"""Importing the package is quick and leaves the user's process as it was."""

import subprocess
import sys
from pathlib import Path

import pytest

import dnw_graph

HEAVY = (
    *("lightning", "pytorch_lightning", "matplotlib", "torchdata", "jsonargparse", "torchmetrics", "sklearn"),
    *("torch_geometric", "torchvision", "torchdiffeq", "scipy", "networkx"),
    # PyTorch's compiler takes as long as PyTorch.
    *("torch._dynamo", "torch._inductor", "sympy"),
)


def run(program):
    """What a program prints, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(dnw_graph.__file__).parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.strip()


def test_no_heavy_package_is_imported():
    modules = "dnw_graph, dnw_graph.models, dnw_graph.ops, dnw_graph.sparse_layers"
    assert run(f"import sys, {modules}; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_names_of_functions_are_functions_whatever_was_imported_before():
    program = """
import dnw_graph.compaction.model, dnw_graph.sparse_layers.apply, dnw_graph.analysis.cost
import dnw_graph
from dnw_graph import attach, compact, cost, sparsify
print([each.__module__ for each in (sparsify, compact, cost, attach)])
"""
    modules = ["sparse_layers.apply", "compaction.model", "analysis.cost", "updates"]
    assert run(program) == str([f"dnw_graph.{name}" for name in modules])


@pytest.mark.slow
def test_a_graph_trains_without_a_heavy_package():
    packages = [name for name in HEAVY if not name.startswith("torch._") and name != "sympy"]  # optimisers import these
    program = f"""
import sys, torch
from dnw_graph import NeuralGraph
graph = NeuralGraph(blocks=(4, 8, 4), num_edges=20)
optimizer = torch.optim.SGD(graph.parameters(), 0.1)
graph(torch.randn(2, 4, 5, 5)).square().mean().backward()
optimizer.step()
graph.eval()(torch.randn(2, 4, 5, 5))
print([m for m in {packages} if m in sys.modules])
"""
    assert run(program) == "[]"


@pytest.mark.slow
def test_programs_that_train_start_without_a_warning():
    pytest.importorskip("lightning")
    assert run("import dnw_graph.training") == ""


@pytest.mark.slow
def test_compact_models_are_loaded_without_pyg_and_solvers(tmp_path):
    pytest.importorskip("safetensors")
    from dnw_graph.compaction import compact, save_compact

    path = tmp_path / "graph.safetensors"
    save_compact(compact(dnw_graph.NeuralGraph((2, 3, 2), 6).eval()), path)
    program = f"""
import sys, torch
from dnw_graph.compaction import load_compact
load_compact({str(path)!r})(torch.randn(1, 2, 4, 4))
print([m for m in ("torch_geometric", "torchdiffeq", "torchvision", "lightning") if m in sys.modules])
"""
    assert run(program) == "[]"


@pytest.mark.slow
def test_no_warning_filter_is_changed():
    program = """
import warnings, torch
before = list(warnings.filters)
import dnw_graph
from dnw_graph.propagation import MessagePassingPropagation
print([entry for entry in warnings.filters if entry not in before])
graph = dnw_graph.NeuralGraph((2, 3, 2), 6, propagation=MessagePassingPropagation("csr"))
graph(torch.randn(2, 2, 4, 4)).sum().backward()
graph.to_data()
print([str(entry[1]) for entry in warnings.filters if entry not in before and "CSR" in str(entry[1])])
"""
    assert run(program) == "[]\n[]"


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
