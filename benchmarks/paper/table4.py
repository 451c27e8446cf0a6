"""Table 4 of the paper: sparse ResNet-50 on ImageNet, with the rows that its authors published later.

The weights that each row keeps, without training:

    python benchmarks/paper/table4.py --parameters

All rows with the paper's recipe and one seed; other options are those of examples/imagenet_resnet50.py:

    python benchmarks/paper/table4.py --data /path/to/imagenet --seeds 0 --devices 4

Every row end to end with a ResNet-18 on scikit-learn's digits in a few minutes on two CPU cores; two epochs show that
it runs, not how well it learns:

    python benchmarks/paper/table4.py --quick
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from rows import Row, Table
from runner import main as run_table
from torchvision.models import resnet50

from dnw_graph.analysis.cost import cost_of
from dnw_graph.recipes.models import FAMILIES
from dnw_graph.sparse_layers.budget import edges_per_weight
from dnw_graph.sparse_layers.layers import find_weights

# Top-1 and top-5 accuracy in percent, by the share of weights in percent. Table 4 has both at 10, 20, 30 and 100;
# the rows that were published later have only top-1.
ALL_SPARSE = {
    10: "74.0 / 92.0",
    20: "76.2 / 93.0",
    30: "76.9 / 93.0",
    40: "77.29",
    50: "77.53",
    60: "77.54",
    70: "77.60",
    80: "77.61",
    90: "77.49",
}
FIRST_DENSE = {
    10: "75.0 / 92.5",
    20: "76.6 / 93.4",
    30: "77.1 / 93.5",
    40: "77.46",
    50: "77.57",
    60: "77.56",
    70: "77.49",
    80: "77.28",
    90: "77.38",
}
# Dettmers and Zettlemoyer 2019, as printed in Table 4; their dense network differs from the paper's baseline.
SPARSE_MOMENTUM = {10: "72.9 / 91.5", 20: "74.9 / 92.5", 30: "75.9 / 92.9"}
THEIR_DENSE = ("Sparse Networks from Scratch", "77.0 / 93.5")
DENSE = Row("Dense Baseline, 100%", "resnet50_dense", "77.5 / 93.7")


def _rows() -> list[Row]:
    rows = []
    for percent in ALL_SPARSE:
        methods = (
            ("Sparse Networks from Scratch (sparse momentum)", "momentum", SPARSE_MOMENTUM),
            ("All Layers Sparse", "sparse", ALL_SPARSE),
            ("First Layer Dense", "first_dense", FIRST_DENSE),
        )
        for label, name, paper in methods:
            if percent in paper:
                rows.append(Row(f"{label}, {percent}%", f"resnet50_{name}_{percent / 100}", paper[percent]))
    return [*rows, DENSE]


TABLE = Table(
    name="table4",
    title="Table 4: sparse ResNet-50; the paper's figures are top-1 / top-5",
    example="examples/imagenet_resnet50.py",
    models=FAMILIES["resnet"],
    rows=tuple(_rows()),
    quick={
        "model": "resnet18",
        "data": "digits",
        "image_size": "8",
        "epochs": "2",
        "batch_size": "256",
        "lr": "0.064",
    },
    data=("imagenet",),
    seeds=1,
    top5=True,
)


def parameters_kept(percent: int, first_layer_dense: bool = False) -> tuple[int, int]:
    """Return how many weights of convolutions and classifier ResNet-50 keeps, and how many parameters in total.

    Biases and norms stay dense and count among the parameters.

    Args:
        percent: Share of the weights of each layer, in percent.
        first_layer_dense: Whether the first convolution keeps all of its weights.
    """
    with torch.device("meta"):  # shapes alone
        model = resnet50()
    weights = list(find_weights(model))
    dense = [weight for weight in weights if first_layer_dense and weight.name == "conv1.weight"]
    sparse = [weight for weight in weights if weight not in dense]
    kept = sum(weight.numel for weight in dense) + sum(edges_per_weight(sparse, percent / 100, "uniform"))
    return kept, cost_of(model, None).parameters - sum(weight.numel for weight in weights) + kept


def parameter_lines() -> list[str]:
    """Return a Markdown table: weights and parameters that each row keeps, and the paper's accuracy."""
    all_weights, all_parameters = parameters_kept(100)
    lines = ["ResNet-50: weights that each row keeps, and the paper's accuracy", ""]
    lines += ["| method | weights kept | of all | parameters | of all | paper, top-1 / top-5, % |"]
    lines += ["|" + " --- |" * 6]
    for row in TABLE.rows:
        percent = int(row.label.rpartition(", ")[2].removesuffix("%"))
        kept, parameters = parameters_kept(percent, "first_dense" in row.config)
        shares = kept / all_weights, parameters / all_parameters
        lines.append(f"| {row.label} | {kept:,} | {shares[0]:.2%} | {parameters:,} | {shares[1]:.2%} | {row.paper} |")
    label, paper = THEIR_DENSE
    lines.append(f"| {label}, 100% | {all_weights:,} | 100.00% | {all_parameters:,} | 100.00% | {paper} |")
    return [
        *lines,
        "",
        "Weights: those of convolutions and classifier. Parameters: with biases and norms, which stay dense. "
        "Sparse momentum keeps as many weights as All Layers Sparse, and moves them between layers.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the weights that each row keeps, run the table, and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words != ["--help"]:
        print("\n".join([*parameter_lines(), ""]), flush=True)
    return 0 if words == ["--parameters"] else run_table(TABLE, __doc__ or "", words)


if __name__ == "__main__":
    sys.exit(main())
