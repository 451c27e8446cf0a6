"""A sparse vision transformer in a plain loop, compiled, on two processes, with mixed precision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sparse_model import batches, make_model, train

import dnw_graph
from dnw_graph import InputError
from dnw_graph.sparsify import sparsify, weight_graphs


def run(script, *arguments):
    """Start a script of this folder without type checks."""
    paths = [str(Path(dnw_graph.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    return subprocess.Popen(command, env=environment)


def test_a_vision_transformer_learns_digits():
    model = make_model(torch.float32)
    sparsify(model, density=0.2)
    before = {name: graph.real_index for name, graph in weight_graphs(model).items()}
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = train(model, batches(56, 32, torch.float32) * 3, optimiser=optimiser)
    assert sum(losses[-10:]) / 10 < 1.8 < 2.2 < sum(losses[:3]) / 3
    swapped = [not torch.equal(graph.real_index, before[name]) for name, graph in weight_graphs(model).items()]
    assert all(swapped)


def test_compiled_in_one_graph(tmp_path):
    assert run("compiled.py", tmp_path / "results.pt").wait(timeout=300) == 0
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results) == 2
    for name, result in results.items():
        for compiled, plain in result["pairs"]:
            torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-11, msg=name)
    assert set(results["counts its steps"]["steps"]) == {3}


def test_the_operator_refuses_a_model_that_is_gone():
    with pytest.raises(InputError, match="is gone"):
        torch.ops.dnw_graph.real_masks([torch.zeros(1)], [torch.zeros(1)], "no such model", True)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    processes = [run("data_parallel.py", tmp_path, rank) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for wiring in ("dnw", "random_graph"):
        model = make_model()
        sparsify(model, 0.3, wiring)
        train(model, batches())
        for name, value in model.state_dict().items():
            assert torch.equal(first[wiring][name], second[wiring][name]), name
            torch.testing.assert_close(first[wiring][name], value, rtol=1e-9, atol=1e-11)


def test_mixed_precision():
    """Weights are chosen among the float32 values and stay float32."""
    model = make_model(torch.float32)
    sparsify(model, 0.2)
    x, y = batches(1, 25, torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    original = model.encoder.layers[0].mlp[0].parametrizations.weight.original
    assert original.dtype == original.grad.dtype == torch.float32
    assert original.grad.ne(0).float().mean() > 0.9
