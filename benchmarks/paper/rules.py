"""Compares eleven rules: ResNet-20 on CIFAR-10 with a twentieth and a tenth of its weights.

All rows, 3 seeds each, in mixed precision with bfloat16; a step takes 0.25 (dense) to 0.33 s (Top-KAST) of one core
(Intel Xeon with AMX; float32 0.40), a run 1.2 hours or more. --compile saves a fifth of it (DNW: 0.17 against 0.22 s on
a core of an Intel Xeon with nothing else running). Processors without AMX need --precision 32-true: with bfloat16 a
dense step takes several seconds there. Each row shows its precision:

    python benchmarks/paper/rules.py --data cifar10 --jobs 2

Every row end to end on scikit-learn's digits in a few minutes on two CPU cores:

    python benchmarks/paper/rules.py --quick
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from resnet20 import MODELS
from rows import Row, Table
from runner import main

RULES = {
    "random_graph": "random graph",
    "dnw": "DNW",
    "no_update": "no update rule",
    "set": "SET",
    "rigl": "RigL",
    "sparse_momentum": "sparse momentum",
    "gmp": "gradual magnitude pruning",
    "top_kast": "Top-KAST",
    "ac_dc": "AC/DC",
}
DENSITIES = (0.05, 0.1)
# M is as large as k, λ is that of the paper.
OPTIONS = {"top_kast": lambda density: {"extra": density, "strength": 1e-4}}
# The threshold decays with five times the weight decay: it ends near 0.1 unless a gradient counteracts.
STR = {"start": -5.0, "weight_decay": 5e-4}


def _row(rule: str, density: float) -> Row:
    options = {"wiring": rule, "density": str(density)}
    if rule in OPTIONS:
        options["wiring_options"] = json.dumps(OPTIONS[rule](density))
    return Row(f"{RULES[rule]}, {density:.0%}", "resnet20", options=options, name=f"resnet20_{rule}_{density}")


TABLE = Table(
    name="rules",
    title="Rules side by side: ResNet-20 on CIFAR-10",
    example="benchmarks/paper/resnet20.py",
    models=MODELS,
    rows=(
        Row("dense", "resnet20", options={"density": "1"}, name="resnet20_dense"),
        *(_row(rule, density) for density in DENSITIES for rule in RULES),
        Row(
            "STR, at the density that it reaches",
            "resnet20",
            options={"wiring": "str", "wiring_options": json.dumps(STR)},
            name="resnet20_str",
        ),
        Row("N:M, 2 of 4", "resnet20", options={"wiring": "nm"}, name="resnet20_nm"),
    ),
    quick={"data": "digits", "epochs": "2", "batch_size": "64"},
    configs=Path(__file__).parent,
    free=("precision",),
    seeds=3,
    margins=tuple(
        (f"resnet20_{rule}_{density}", f"resnet20_random_graph_{density}")
        for density in DENSITIES
        for rule in RULES
        if rule != "random_graph"
    ),
)

if __name__ == "__main__":
    sys.exit(main(TABLE, __doc__ or ""))
