"""Train and evaluate the tiny classifiers of Table 1: a graph of 800 nodes in static, discrete or continuous time.

With no option, the static graph learns scikit-learn's digits on a CPU:

    python examples/cifar10_tiny.py

A row of Table 1 on CIFAR-10:

    python examples/cifar10_tiny.py --config examples/configs/tiny_discrete_dnw.yaml --data cifar10
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dnw_graph import stopping

if __name__ == "__main__":
    stopping.start()  # before the imports that take seconds

from dnw_graph.recipes.models import TINY_RECIPE, TinyOptions
from dnw_graph.training import main


def run_example(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit status."""
    return main(__doc__ or "", TinyOptions, TINY_RECIPE, argv)


if __name__ == "__main__":
    sys.exit(run_example())
