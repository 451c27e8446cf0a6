"""Dead nodes as a function of weight decay, which may eliminate dead ends according to footnote 2 of the paper.

MobileNetV1-DNW (×0.225) as in Table 2, with several weight decays:

    python benchmarks/paper/weight_decay.py --data cifar10 --jobs 4

The same on scikit-learn's digits in a few minutes on two CPU cores:

    python benchmarks/paper/weight_decay.py --quick
"""

from __future__ import annotations

import sys

from rows import Row, Table
from runner import main
from table2 import QUICK

from dnw_graph.recipes.models import FAMILIES

TABLE = Table(
    name="weight_decay",
    title="Dead nodes by weight decay (footnote 2), MobileNetV1-DNW (×0.225)",
    example="examples/imagenet_mobilenet.py",
    models=FAMILIES["mobilenet"],
    rows=tuple(
        Row(f"weight decay {decay}", "cifar10_dnw", options={"weight_decay": decay})
        for decay in ("0", "1e-5", "1e-4", "5e-4", "2e-3")
    ),
    quick=QUICK,
)

if __name__ == "__main__":
    sys.exit(main(TABLE, __doc__ or ""))
