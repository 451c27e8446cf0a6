"""Shared fixtures. Shapes and types in the package's signatures are checked while the tests run.

The checks take a third of the time of small tests: CHECK_SIGNATURES=0 leaves them out.
"""

import os

import jaxtyping

# Before the first import of the package, here and in every test module.
if os.environ.get("CHECK_SIGNATURES") != "0":
    jaxtyping.install_import_hook("dnw_graph", "beartype.beartype")

import pytest
import torch
from hypothesis import settings
from sklearn.datasets import load_digits

# The tests' tensors are small: one thread is faster than two, ten times so on a busy machine.
torch.set_num_threads(1)

settings.register_profile("dnw_graph", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("dnw_graph")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits: images [1797, 8, 8] in 0 … 1, float64, and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images).view(-1, 8, 8) / 16, torch.tensor(labels)


@pytest.fixture
def unchecked():
    """Turn the type checks off, for wrong types and shapes that the package itself must refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
