"""Table 4: rows, configurations and counts."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from torch import nn
from torchvision.models import resnet50

from dnw_graph.sparse_layers import sparsify

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
RECIPE = {
    "model": "resnet50",
    "data": "imagenet",
    "image_size": 224,
    "epochs": 100,
    "batch_size": 256,
    "lr": 0.256,
    "warmup_epochs": 5,
    "held_out": 0,
    "momentum": 0.875,
    "weight_decay": 2**-15,
    "norm_weight_decay": False,
    "label_smoothing": 0.1,
}
# Table 4 of the paper, and what its authors published later: top-1 / top-5 by share of weights.
PAPER = {
    "sparse": ["74.0 / 92.0", "76.2 / 93.0", "76.9 / 93.0", "77.29", "77.53", "77.54", "77.60", "77.61", "77.49"],
    "first_dense": ["75.0 / 92.5", "76.6 / 93.4", "77.1 / 93.5", "77.46", "77.57", "77.56", "77.49", "77.28", "77.38"],
    "momentum": ["72.9 / 91.5", "74.9 / 92.5", "75.9 / 92.9"],
}


@pytest.fixture(scope="module")
def table4() -> ModuleType:
    folder = str(ROOT / "benchmarks" / "paper")
    sys.path.insert(0, folder)
    try:
        return __import__("table4")
    finally:
        sys.path.remove(folder)


def test_rows_are_those_of_the_paper(table4: ModuleType):
    expected = {"resnet50_dense": "77.5 / 93.7"}
    for method, figures in PAPER.items():
        expected |= {f"resnet50_{method}_0.{tenth}": figure for tenth, figure in enumerate(figures, start=1)}
    assert {row.config: row.paper for row in table4.TABLE.rows} == expected


def test_every_row_has_its_configuration(table4: ModuleType):
    for row in table4.TABLE.rows:
        method, _, density = row.config.removeprefix("resnet50_").rpartition("_")
        changes = {
            "sparse": {},
            "first_dense": {"first_layer_dense": True},
            "momentum": {"wiring": "sparse_momentum"},
            "": {},
        }
        share = 1 if row.config == "resnet50_dense" else float(density)
        found = yaml.safe_load((CONFIGS / f"{row.config}.yaml").read_text())
        assert found == {**RECIPE, "density": share, **changes[method]}
    assert {path.stem for path in CONFIGS.glob("resnet50_*.yaml")} == {row.config for row in table4.TABLE.rows}


@pytest.mark.slow
def test_parameters_kept_are_those_of_sparse_models(table4: ModuleType):
    """Counted in a model whose weights are cut by hand: n - ⌊0.9 n⌋ of the largest of each layer."""
    model = resnet50()
    layers = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    sizes = [weight.numel() for weight in layers]
    dense = sum(parameter.numel() for parameter in model.parameters()) - sum(sizes)
    for percent in (10, 20, 30, 70):
        kept = [size - size * (100 - percent) // 100 for size in sizes]
        assert table4.parameters_kept(percent) == (sum(kept), sum(kept) + dense)
        kept[0] = 64 * 3 * 7 * 7
        assert table4.parameters_kept(percent, first_layer_dense=True) == (sum(kept), sum(kept) + dense)
    assert table4.parameters_kept(100) == (sum(sizes), 25_557_032)
    table = sparsify(model, density=0.1, skip=["conv1"])
    assert table.kept + 9408 == table4.parameters_kept(10, first_layer_dense=True)[0]


def test_the_printed_table(table4: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert table4.main(["--parameters"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == len(table4.TABLE.rows) + 1
    for cells in lines:
        percent = int(re.search(r", (\d+)%", cells[0])[1])
        # "The parameters in the first layer constitute only 0.04% of the total network."
        assert float(cells[2].removesuffix("%")) == pytest.approx(percent, abs=0.041)
    assert lines[-1][-1] == "77.0 / 93.5 |"
    assert lines[-2][3] == "25,557,032"


@pytest.mark.slow
def test_a_row_runs_and_is_told_with_top5(table4: ModuleType, tmp_path: Path):
    argv = ["--quick", "--rows", "resnet50_momentum_0.1", "--output", str(tmp_path), "--accelerator", "cpu"]
    argv += ["--batch-size", "512"]
    assert table4.main(argv) == 0
    run = json.loads((tmp_path / "resnet50_momentum_0.1" / "seed0" / "result.json").read_text())
    layers = run["summary"]["weights"].values()
    kept, weights = (sum(layer[name] for layer in layers) for name in ("kept", "weights"))
    assert kept == pytest.approx(weights / 10, abs=21)
    line = next(line for line in (tmp_path / "table4.md").read_text().splitlines() if line.startswith("| Sparse Net"))
    cells = line.strip("| ").split(" | ")
    accuracies = [f"{100 * run['summary'][name]:.1f}" for name in ("top1", "best_top1", "top5")]
    assert cells[1:7] == [*accuracies, "1", "2", f"{kept:,}"]
    assert torch.load(tmp_path / "resnet50_momentum_0.1" / "seed0" / "last.ckpt", weights_only=True)["global_step"] == 4
