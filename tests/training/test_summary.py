from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch_geometric.data import Data

from dnw_graph import InputError, NeuralGraph
from dnw_graph.analysis.cost import cost
from dnw_graph.sparse_layers import sparsify, to_data
from dnw_graph.training import ImageData, RunOptions, read_checkpoint, run
from dnw_graph.training.summary import Summary, write_files


def test_what_a_run_leaves(
    create: Callable[[int, int], nn.Module],
    small_digits: ImageData,
    options: Callable[..., RunOptions],
    capsys,
):
    chosen = options(epochs=1)
    directory = Path(chosen.output or "")
    summary = run(create, {"model": "tiny"}, chosen, small_digits)
    model = create(10, 8)
    weights = read_checkpoint(directory / "last.ckpt")["state_dict"]
    model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    model.eval()

    written = json.loads((directory / "summary.json").read_text())
    assert written["top1"] == summary.top1
    assert written["parameters"] == cost(model, (3, 8, 8)).parameters
    assert written["multiply_adds"] == cost(model, (3, 8, 8)).multiply_adds
    assert written["graphs"]["tiny"]["real_edges"] == 40
    assert written["options"]["model"] == "tiny"
    assert written["options"]["lr"] == 1.0

    data = Data.from_dict(torch.load(directory / "wiring" / "tiny.pt", weights_only=True))
    assert data.num_nodes == 22
    assert torch.equal(data.edge_index, model.graph.edge_index)
    assert torch.equal(data.edge_weight, model.graph.edge_weight)
    with Image.open(directory / "wiring" / "tiny.png") as picture:
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
    assert f"written to {directory}" in printed
    for name in ("last.ckpt", "best.ckpt", "metrics.csv", "summary.json"):
        assert name in printed
        assert (directory / name).is_file()
    assert list((directory / "tensorboard").iterdir())


SUMMARY = Summary(0.5, 1.0, None, None, 1, 1, None, None, {}, {}, {})


def test_file_names_are_safe_and_differ(tmp_path: Path):
    layers = {name: nn.Linear(3, size) for size, name in enumerate(("a/b", "A/b", "a_b", "ä" * 300), start=3)}
    model = nn.ModuleDict(layers)
    sparsify(model, 0.5)
    model["graph"] = NeuralGraph(blocks=(2, 3), num_edges=4, name="../a_b.weight")
    directory = tmp_path / "run"
    directory.mkdir()
    assert write_files(SUMMARY, model, directory) == ["summary.json", "wiring/*.png", "wiring/*.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    files = list((directory / "wiring").glob("*.pt"))
    assert len({path.name.lower() for path in files}) == len(files) == 5
    assert all(path.name.isascii() and len(path.name) < 256 for path in files)
    written = [Data.from_dict(torch.load(path, weights_only=True)) for path in files]
    expected = [model["graph"].to_data(), *(to_data(model, f"{name}.weight") for name in layers)]
    by_size = (sorted(graphs, key=lambda data: data.num_nodes) for graphs in (written, expected))
    for one, other in zip(*by_size, strict=True):
        assert torch.equal(one.edge_index, other.edge_index)
        assert torch.equal(one.edge_weight, other.edge_weight)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = nn.Linear(3, 4)
    sparsify(model, 0.5)
    write_files(SUMMARY, model, tmp_path)
    before = (tmp_path / "wiring" / "weight.pt").read_bytes()
    nn.init.zeros_(model.parametrizations.weight.original)
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target.suffix == ".pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"cannot write .*weight.pt \(No space left on device\): make room, or give"):
        write_files(SUMMARY, model, tmp_path)
    assert (tmp_path / "wiring" / "weight.pt").read_bytes() == before
    assert [path.name for path in (tmp_path / "wiring").iterdir()] == ["weight.pt"]
