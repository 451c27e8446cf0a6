"""Table 1 of the paper: tiny classifiers in static, discrete and continuous time, on CIFAR-10.

All rows, 5 seeds each, with the paper's schedule of 160 epochs:

    python benchmarks/paper/table1.py --data cifar10 --jobs 3

Every row end to end on scikit-learn's digits in a few minutes on two CPU cores:

    python benchmarks/paper/table1.py --quick
"""

from __future__ import annotations

import sys

from rows import Row, Table
from runner import main

from dnw_graph.recipes.models import FAMILIES

TABLE = Table(
    name="table1",
    title="Table 1: tiny classifiers",
    example="examples/cifar10_tiny.py",
    models=FAMILIES["tiny"],
    rows=(
        Row("Static (RG)", "tiny_static_rg", "76.1 ± 0.5"),
        Row("Static (DNW)", "tiny_static_dnw", "80.9 ± 0.6"),
        Row("Discrete Time (RG)", "tiny_discrete_rg", "77.3 ± 0.7"),
        Row("Discrete Time (DNW)", "tiny_discrete_dnw", "82.3 ± 0.6"),
        Row("Continuous (RG)", "tiny_continuous_rg", "78.5 ± 1.2"),
        Row("Continuous (DNW)", "tiny_continuous_dnw", "83.1 ± 0.3"),
    ),
    margins=tuple((f"tiny_{time}_dnw", f"tiny_{time}_rg") for time in ("static", "discrete", "continuous")),
    quick={"data": "digits", "image_size": "16", "epochs": "1", "batch_size": "64"},
)

if __name__ == "__main__":
    sys.exit(main(TABLE, __doc__ or ""))
