import shutil

import pytest

from dnw_graph.ops.build import kernels


@pytest.fixture
def has_compiler():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")


@pytest.fixture(params=["kernel", "plain"])
def way(request, monkeypatch):
    """Each test once with the compiled kernels and once with PyTorch's operations."""
    if request.param == "plain":
        monkeypatch.setenv("DNW_GRAPH_KERNELS", "0")
    else:
        request.getfixturevalue("has_compiler")
        monkeypatch.delenv("DNW_GRAPH_KERNELS", raising=False)
        assert kernels() is not None
    return request.param
