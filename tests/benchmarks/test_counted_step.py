"""What the counted training step counts, by hand and by PyTorch's own counter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dnw_graph.models import TinyClassifier


@pytest.fixture(scope="module")
def counted() -> ModuleType:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return __import__("counted_step")
    finally:
        sys.path.remove(folder)


def test_operators_counted_by_hand(counted: ModuleType) -> None:
    x, grad = torch.empty(2, 6, 8, 8, device="meta"), torch.empty(2, 6, 4, 4, device="meta")
    weight = torch.empty(6, 1, 3, 3, device="meta", requires_grad=True)
    with counted.Counter() as counter:
        y = F.conv2d(x.relu_(), weight, stride=2, padding=1, groups=6)
        y.transpose(1, 2).backward(grad.transpose(1, 2))
        torch.zeros(7, device="meta").copy_(torch.zeros(7, device="meta", dtype=torch.float64))
    products = 2 * 2 * 6 * 4 * 4 * 9
    maps = 2 * 6 * 8 * 8, 2 * 6 * 4 * 4
    found = {call.name: (call.operations, call.moved) for call in counter.calls}
    assert found == {
        "relu_": (0, 4 * 2 * maps[0]),
        "convolution": (products, 4 * (maps[0] + maps[1] + 54)),
        # The images ask for no gradient.
        "convolution_backward": (products, 4 * (maps[1] + maps[0] + 54 + 54)),
        "zeros": (0, 7 * 8),
        "copy_": (0, 7 * (8 + 4)),
    }
    assert counted.Call("mm", 3e9, 4e9).milliseconds(counted.Machine(1e12, 1e12)) == 4


@pytest.mark.parametrize("dynamics", ["static", "discrete"])
def test_operations_of_a_step_are_those_of_pytorch(counted: ModuleType, dynamics: str) -> None:
    model = TinyClassifier(dynamics, propagation="block").to("meta")
    images = torch.empty(2, 3, 32, 32, device="meta")
    with FlopCounterMode(display=False) as pytorch:
        F.cross_entropy(model(images), torch.zeros(2, dtype=torch.long, device="meta")).backward()
    calls = counted.calls_of(model, images)
    depthwise = sum(call.operations for call in calls if call.name == "convolution_backward")
    # PyTorch counts the backward pass of a grouped convolution as that of a full one.
    listed = pytorch.get_flop_counts()["Global"]
    theirs = sum(value for name, value in listed.items() if name is not torch.ops.aten.convolution_backward)
    assert sum(call.operations for call in calls) - depthwise == theirs


def test_the_script_prints_and_writes_its_rows(
    counted: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--models", "tiny_static", "--size", "32", "--batch", "8", "--peak", "50", "--operators", "3"]
    monkeypatch.setattr(sys, "argv", ["counted_step.py", *options, "--json", str(tmp_path / "rows.json")])
    counted.main()
    printed = capsys.readouterr().out
    assert "peak 50 TFLOP/s, bandwidth 4.8 TB/s" in printed
    assert printed.count("counted, ms") == 3
    reference, ours = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert reference["GFLOP"] == ours["GFLOP"]
    for row in (reference, ours):
        assert 0 < row["floor, ms"] < row["counted, ms"]
