"""Table 6 of the paper: variants of targeted weight dropout, on CIFAR-10.

All rows, 5 seeds each, with the schedule of the paper, 160 epochs; runs of Table 2 in the same directory are kept:

    python benchmarks/paper/table6.py --data cifar10 --jobs 4

Every row end to end on scikit-learn's digits in a few minutes on two CPU cores:

    python benchmarks/paper/table6.py --quick
"""

from __future__ import annotations

import sys

from rows import Row, Table
from runner import main
from table2 import QUICK

from dnw_graph.recipes.models import FAMILIES

TABLE = Table(
    name="table6",
    title="Table 6: variants of targeted weight dropout, MobileNetV1-DNW (×0.225)",
    example="examples/imagenet_mobilenet.py",
    models=FAMILIES["mobilenet"],
    rows=(
        Row("TD ρ = 0.9, unconstrained", "cifar10_td_0.9", "89.0 ± 0.2"),
        Row("TD ρ = 0.9, regular", "cifar10_td_regular_0.9", "87.9 ± 0.5"),
        Row("TD ρ = 0.95, unconstrained", "cifar10_td_0.95", "89.2 ± 0.4"),
        Row("TD ρ = 0.95, regular", "cifar10_td_regular_0.95", "87.9 ± 0.2"),
        Row("TD ρ = 0.99, unconstrained", "cifar10_td_0.99", "88.6 ± 0.2"),
        Row("TD ρ = 0.99, regular", "cifar10_td_regular_0.99", "87.7 ± 0.3"),
        Row("TD ρ = γ, unconstrained", "cifar10_td_gamma", "88.8 ± 0.2"),
        Row("TD ρ = γ, regular", "cifar10_td_regular_gamma", "87.9 ± 0.2"),
    ),
    quick=QUICK,
)

if __name__ == "__main__":
    sys.exit(main(TABLE, __doc__ or ""))
