"""Building the kernels: by the first call, whoever comes first; without a compiler PyTorch does the work."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import dnw_graph
from dnw_graph.ops import build, sparse_product

# Prints what was loaded after the import, and whether the first product is right.
PROGRAM = """
import torch
from dnw_graph.ops import build, sparse_product
print(build._load.cache_info().currsize)
product = sparse_product(torch.ones(3, 20), torch.tensor([0, 2]), torch.tensor([0, 2]), torch.tensor([1.0, 2.0]))
print(product.eq(3).all().item(), build.kernels() is not None)
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and kernels that nobody has asked for yet."""
    monkeypatch.delenv("DNW_GRAPH_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._load.cache_clear()
    yield tmp_path / "dnw_graph"
    build._load.cache_clear()


def multiply():
    z = torch.arange(40.0).view(2, 20)
    return sparse_product(z, torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([2.0, 1.0]))


@pytest.mark.slow
def test_importing_builds_nothing_and_two_processes_may_build_at_once(cache, has_compiler):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    root = Path(dnw_graph.__file__).parents[1]
    for process in [subprocess.Popen(command, cwd=root, **pipes) for _ in range(2)]:
        assert process.communicate(timeout=300) == ("0\nTrue True\n", "")
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_what_was_built_is_found_again_unless_the_source_has_changed(cache, has_compiler, monkeypatch, tmp_path):
    source = tmp_path / "sources" / "kernels.cpp"
    source.parent.mkdir()
    monkeypatch.setattr(build, "SOURCES", source.parent)
    source.write_text('extern "C" int answer() { return 1; }')
    library = build._build()
    library.write_text("kept")
    assert build._build().read_text() == "kept"
    source.write_text('extern "C" int answer() { return 2; }')
    assert build._build() != library
    assert build.kernels().answer() == 2


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("false", "false failed"), ("/no/such/compiler --option", "No such file"), (None, "no C.. compiler found")],
)
def test_without_a_compiler_one_warning_and_the_same_result(cache, monkeypatch, compiler, reason):
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(cache))
    else:
        monkeypatch.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match=f"could not be built.*{reason}.*DNW_GRAPH_KERNELS=0") as warned:
        received = multiply()
    assert len([w for w in warned if "could not be built" in str(w.message)]) == 1
    assert received.tolist() == [[float(3 * f + 20) for f in range(20)]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multiply()


def test_a_source_that_does_not_compile_is_reported_with_the_compilers_first_error(
    cache, has_compiler, monkeypatch, tmp_path
):
    broken = tmp_path / "sources" / "kernels.cpp"
    broken.parent.mkdir()
    broken.write_text("int main() { return nonsense; }")
    monkeypatch.setattr(build, "SOURCES", broken.parent)
    with pytest.warns(UserWarning, match="nonsense"):
        assert build.kernels() is None
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_reported(cache, has_compiler):
    cache.parent.joinpath("dnw_graph").write_text("a file in the way")
    with pytest.warns(UserWarning, match="File exists"):
        assert build.kernels() is None


def test_the_kernels_can_be_switched_off(cache, monkeypatch):
    monkeypatch.setenv("DNW_GRAPH_KERNELS", "0")
    assert build.kernels() is None
    multiply()
    assert not cache.exists()
