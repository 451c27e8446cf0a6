"""MobileNetV1, a random graph and a learned one on Imagenette, 10 classes of ImageNet, at 64 pixels.

Scale the images to 80 pixels on the shorter side once, with shrink.py; then run all rows, 3 seeds each:

    python benchmarks/paper/shrink.py imagenette imagenette80
    python benchmarks/paper/imagenette.py --data imagenette80 --data-name imagenette80 --jobs 2

Every row end to end on scikit-learn's digits in a few minutes on two CPU cores:

    python benchmarks/paper/imagenette.py --quick
"""

from __future__ import annotations

import sys

from rows import Row, Table
from runner import main
from table2 import QUICK

from dnw_graph.recipes.models import FAMILIES

TABLE = Table(
    name="imagenette",
    title="Imagenette at 64 pixels",
    example="examples/imagenet_mobilenet.py",
    models=FAMILIES["mobilenet"],
    rows=(
        Row("MobileNetV1 (×0.25)", "mobilenet_v1_x0.25"),
        Row("MobileNetV1-RG (×0.225)", "mobilenet_v1_rg_x0.225"),
        Row("MobileNetV1-DNW (×0.225)", "mobilenet_v1_dnw_x0.225"),
        *(
            Row(
                f"MobileNetV1-{kind.upper()} (×0.225), 1e-3 in the norms of nodes, warm-up of 5 epochs",
                f"mobilenet_v1_{kind}_x0.225",
                options={"node_norm_eps": "1e-3", "warmup_epochs": "5"},
                name=f"mobilenet_v1_{kind}_x0.225_eps_warmup",
            )
            for kind in ("rg", "dnw")
        ),
    ),
    quick=QUICK,
    data=("imagenette80",),
    options={"image_size": "64", "epochs": "100", "batch_size": "128", "lr": "0.1"},
    seeds=3,
    margins=(
        ("mobilenet_v1_dnw_x0.225", "mobilenet_v1_rg_x0.225"),
        ("mobilenet_v1_dnw_x0.225", "mobilenet_v1_x0.25"),
        ("mobilenet_v1_dnw_x0.225_eps_warmup", "mobilenet_v1_rg_x0.225_eps_warmup"),
    ),
)

if __name__ == "__main__":
    sys.exit(main(TABLE, __doc__ or ""))
