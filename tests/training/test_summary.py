from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch_geometric.data import Data

from dnw_graph.cost import cost
from dnw_graph.training import ImageData, RunOptions, read_checkpoint, run


def test_what_a_run_leaves(
    create: Callable[[int, int], nn.Module],
    small_digits: ImageData,
    options: Callable[..., RunOptions],
    capsys,
):
    chosen = options(epochs=1)
    folder = Path(chosen.output or "")
    summary = run(create, {"model": "tiny"}, chosen, small_digits)
    model = create(10, 8)
    weights = read_checkpoint(folder / "last.ckpt")["state_dict"]
    model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    model.eval()

    written = json.loads((folder / "summary.json").read_text())
    assert written["top1"] == summary.top1
    assert written["parameters"] == cost(model, (3, 8, 8)).parameters
    assert written["multiply_adds"] == cost(model, (3, 8, 8)).multiply_adds
    assert written["graphs"]["tiny"]["real_edges"] == 40
    assert written["options"]["model"] == "tiny"
    assert written["options"]["lr"] == 1.0

    data = Data.from_dict(torch.load(folder / "wiring" / "tiny.pt", weights_only=True))
    assert data.num_nodes == 22
    assert torch.equal(data.edge_index, model.graph.edge_index)
    assert torch.equal(data.edge_weight, model.graph.edge_weight)
    with Image.open(folder / "wiring" / "tiny.png") as picture:
        assert min(picture.size) > 300
        assert len(set(picture.convert("RGB").resize((64, 64)).getdata())) > 10

    printed = capsys.readouterr().out
    for name in (
        "top-1",
        "top-5",
        "real edges",
        "edges swapped",
        "dead nodes",
        "parameters",
        "multiply-adds",
        "wall time",
    ):
        assert f"\n{name} " in printed
    assert f"written to {folder}" in printed
    for name in ("last.ckpt", "best.ckpt", "metrics.csv", "summary.json"):
        assert name in printed
        assert (folder / name).is_file()
    assert list((folder / "tensorboard").iterdir())
