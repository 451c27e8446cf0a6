"""Table 2 of the paper: ways of finding a wiring, on CIFAR-10.

All rows, 5 seeds each, with the paper's schedule of 160 epochs:

    python benchmarks/paper/table2.py --data cifar10 --jobs 4

Every row end to end on scikit-learn's digits in a few minutes on two CPU cores:

    python benchmarks/paper/table2.py --quick

A part of it, with another schedule:

    python benchmarks/paper/table2.py --rows cifar10_rg cifar10_dnw --seeds 0 1 --epochs 30
"""

from __future__ import annotations

import sys

from rows import Row, Table
from runner import main

from dnw_graph.recipes.models import FAMILIES

COMPLETE = "cifar10_complete"
QUICK = {"data": "digits", "image_size": "16", "epochs": "3", "batch_size": "64"}
TABLE = Table(
    name="table2",
    title="Table 2: ways of finding a wiring, MobileNetV1-DNW (×0.225)",
    example="examples/imagenet_mobilenet.py",
    models=FAMILIES["mobilenet"],
    rows=(
        Row("MobileNetV1 (×0.25)", "cifar10_mobilenet_v1_x0.25", "86.3 ± 0.2"),
        Row("MobileNetV1-RG (×0.225)", "cifar10_rg", "87.2 ± 0.1"),
        Row("No Update Rule", "cifar10_no_update", "86.7 ± 0.5"),
        Row("L1 + Anneal", "cifar10_l1_anneal", "84.3 ± 0.6"),
        Row("TD ρ = 0.75", "cifar10_td_0.75", "87.8 ± 0.4"),
        Row("TD ρ = 0.9", "cifar10_td_0.9", "89.0 ± 0.2"),
        Row("TD ρ = 0.95", "cifar10_td_0.95", "89.2 ± 0.4"),
        Row("TD ρ = 0.99", "cifar10_td_0.99", "88.6 ± 0.2"),
        Row("TD ρ = γ", "cifar10_td_gamma", "88.8 ± 0.2"),
        Row("complete graph, the first stage of †", COMPLETE),
        Row("Lottery Ticket (one-shot) †", "cifar10_lottery_ticket", "87.9 ± 0.3", first_stage=COMPLETE),
        Row("Fine Tune α = 0.1 †", "cifar10_fine_tune_0.1", "89.4 ± 0.2", first_stage=COMPLETE),
        Row("Fine Tune α = 0.01 †", "cifar10_fine_tune_0.01", "89.7 ± 0.1", first_stage=COMPLETE),
        Row("Fine Tune α = 0.001 †", "cifar10_fine_tune_0.001", "88.7 ± 0.2", first_stage=COMPLETE),
        Row("MobileNetV1-DNW (×0.225)", "cifar10_dnw", "89.7 ± 0.2"),
        Row("the same, 1e-3 in the norms of nodes, warm-up of 5 epochs", "cifar10_dnw_eps_warmup"),
    ),
    margins=(
        ("cifar10_dnw", "cifar10_rg"),
        ("cifar10_dnw", "cifar10_mobilenet_v1_x0.25"),
        ("cifar10_dnw_eps_warmup", "cifar10_rg"),
    ),
    quick=QUICK,
)

if __name__ == "__main__":
    sys.exit(main(TABLE, __doc__ or ""))
