from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TinyModel
from torch import nn

import dnw_graph
from dnw_graph.checkpoint import model_weights
from dnw_graph.training import ImageData, RunOptions, read_checkpoint, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed"),
]


def two_processes(directory: Path, accumulate: int) -> None:
    """Train two models on two processes, each of which divides its half of a batch into parts."""
    packages = str(Path(dnw_graph.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(directory), str(accumulate)]
    subprocess.run(command, env=environment, check=True, timeout=300)


def test_two_processes_learn_one_wiring(
    tmp_path: Path,
    create: Callable[[int, int], nn.Module],
    small_digits: ImageData,
    options: Callable[..., RunOptions],
):
    two_processes(tmp_path, accumulate=1)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["real_index"], second["real_index"])
    for name, parameter in create(10, 8).named_parameters():
        assert torch.equal(first["state_dict"][name], second["state_dict"][name]), name
        assert not torch.equal(first["state_dict"][name], parameter), name
    assert first["top1"] == second["top1"]
    last = tmp_path / "run" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 8
    # One process counts the same right answers over all test images as two did over their shares.
    alone = run(create, {}, options(evaluate=str(last), output=None), small_digits)
    assert alone.top1 == first["top1"]
    # They evaluate the model that is saved, not each its own statistics of norms.
    for one, other in zip(first["evaluated"], second["evaluated"], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    best = model_weights(read_checkpoint(tmp_path / "runs" / "1" / "best.ckpt"))
    for found in (first["other"], second["other"]):
        assert all(torch.equal(value, best[name]) for name, value in found.items())


def test_parts_on_two_processes_are_those_of_one(
    tmp_path: Path, small_digits: ImageData, options: Callable[..., RunOptions]
):
    """Four parts of a batch, two on each of two processes or all on one: the same norms see the same images."""
    two_processes(tmp_path, accumulate=2)
    models: list[TinyModel] = []

    def alone(num_classes: int, image_size: int) -> nn.Module:
        models.append(TinyModel(num_classes))
        models[-1].dropout.p = 0.0
        return models[-1]

    run(alone, {}, options(accumulate=4, epochs=2, output=str(tmp_path / "alone")), small_digits)
    graph, parameters = models[0].graph, dict(models[0].named_parameters())
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert torch.equal(found["real_index"], graph.real_index)
        for name, parameter in parameters.items():
            torch.testing.assert_close(found["state_dict"][name], parameter, rtol=1e-3, atol=1e-5, msg=name)
