"""A sparse vision transformer in a plain loop, compiled, on two processes, with mixed precision, exported."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from pairs import rest_is_slow
from sparse_model import RULES, batches, make_model, train
from torch import nn

import dnw_graph
from dnw_graph import InputError
from dnw_graph.sparse_layers import dense_state_dict, densify, sparsify, weight_graphs
from dnw_graph.sparse_layers.weight_graph import WeightGraph


def run(script, *arguments):
    """Start a script of this folder without type checks."""
    paths = [str(Path(dnw_graph.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    return subprocess.Popen(command, env=environment)


@pytest.mark.slow
def test_a_vision_transformer_learns_digits():
    model = make_model(torch.float32)
    sparsify(model, density=0.2)
    before = {name: graph.real_index for name, graph in weight_graphs(model).items()}
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = train(model, batches(56, 32, torch.float32) * 3, optimiser=optimiser)
    assert sum(losses[-10:]) / 10 < 1.8 < 2.2 < sum(losses[:3]) / 3
    swapped = [not torch.equal(graph.real_index, before[name]) for name, graph in weight_graphs(model).items()]
    assert all(swapped)


@pytest.mark.slow
def test_compiled_in_one_graph(tmp_path):
    assert run("compiled.py", tmp_path / "results.pt").wait(timeout=300) == 0
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results) == 2
    for name, result in results.items():
        for compiled, plain in result["pairs"]:
            torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-11, msg=name)
        for refusal in result["refusals"]:
            assert "cannot be exported: densify(…) it first" in refusal
    assert set(results["counts its steps"]["steps"]) == {3}


def test_the_operator_refuses_a_model_that_is_gone():
    with pytest.raises(InputError, match="is gone"):
        torch.ops.dnw_graph.real_masks([torch.zeros(1)], [torch.zeros(1)], "no such model", True)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes have after training, each on half of every batch."""
    if not torch.distributed.is_available():
        pytest.skip("PyTorch without torch.distributed")
    folder = tmp_path_factory.mktemp("two_processes")
    processes = [run("data_parallel.py", folder, rank) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_two_processes_train_as_one(name, two_processes):
    model = make_model()
    torch.manual_seed(0)  # of the first process
    sparsify(model, 0.3, RULES[name])
    before = {key: graph.real_index for key, graph in weight_graphs(model).items()}
    train(model, batches())
    moved = [not torch.equal(graph.real_index, before[key]) for key, graph in weight_graphs(model).items()]
    assert any(moved) == (name != "random_graph")
    first, second = (results[name] for results in two_processes)
    assert set(first) == set(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_model_sharded_as_a_whole_trains_as_one(two_processes):
    model = make_model()
    sparsify(model, 0.3)
    train(model, batches())
    for results in two_processes:
        for key, value in model.named_parameters():
            torch.testing.assert_close(results["sharded"][key], value.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_sharded_model_is_saved_and_loaded(two_processes):
    for results in two_processes:
        scores = results["scores"]
        assert not torch.allclose(scores["untrained"], scores["sharded"])
        torch.testing.assert_close(scores["loaded"], scores["sharded"])
        torch.testing.assert_close(scores["restored"], scores["sharded"])


@pytest.mark.slow
def test_a_model_sharded_in_parts_is_refused(two_processes):
    for results in two_processes:
        assert "encoder" in results["sharded in parts"]
        assert "call fully_shard on the whole model only" in results["sharded in parts"]


def test_copies_on_several_devices_are_refused():
    """nn.DataParallel makes copies with ``_replicate_for_data_parallel``, on a CPU as well; one device needs none."""
    model = make_model()
    sparsify(model, 0.3)
    x, y = batches(1)[0]
    F.cross_entropy(nn.DataParallel(model)(x), y).backward()
    with pytest.raises(InputError, match=r"use nn\.parallel\.DistributedDataParallel"):
        model._replicate_for_data_parallel()(x)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
@pytest.mark.parametrize("place", ["the module", "0"])
def test_what_is_wrapped_for_several_processes_is_refused(one_process, place, monkeypatch):
    """Each process would draw its own edges; a single one may."""
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(6, 4))
    model = wrapped if place == "the module" else nn.Sequential(wrapped, nn.Linear(4, 2))
    with monkeypatch.context() as patch:
        patch.setattr(wrapped, "process_group", SimpleNamespace(size=lambda: 2))
        with pytest.raises(
            InputError, match=f"^{place} is a DistributedDataParallel already: sparsify before wrapping"
        ):
            sparsify(model, 0.5, "set")
    sparsify(model, 0.5, "set")


@pytest.mark.parametrize("strict", rest_is_slow([False, True]))
def test_only_a_dense_copy_can_be_exported(strict, unchecked):
    model = make_model().eval()
    sparsify(model, 0.3)
    x, _ = batches(1)[0]
    # A strict export wraps the error.
    with pytest.raises(Exception, match=r"cannot be exported: densify\(…\) it first") as error:
        torch.export.export(model, (x,), strict=strict)
    assert strict or isinstance(error.value, InputError)
    dense = copy.deepcopy(model)
    densify(dense)
    exported = torch.export.export(dense, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), model(x))


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


@pytest.mark.parametrize("wiring", ["random_graph", "no_update", "dnw", "rigl"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_after_an_evaluation_in_inference_mode(wiring, training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Flatten(), nn.Linear(32 * 16, 16))
    sparsify(model, 0.05, wiring)
    x = torch.randn(2, 32, 4, 4)
    expected = copy.deepcopy(model).train(training)
    model.eval()
    with torch.inference_mode():
        model(x)
    model.train(training)
    found = []
    for each in (model, expected):
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        each(given).square().sum().backward()
        found.append((given.grad, *(parameter.grad for parameter in each.parameters())))
    for grad, wanted in zip(*found, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_several_threads_evaluate_one_model():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(6)])
    sparsify(model, 0.05, "random_graph")
    model.eval()
    x = torch.randn(4, 128)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with torch.no_grad(), ThreadPoolExecutor(8) as threads:
            expected = model(x)
            found = list(threads.map(lambda _: evaluated(model, x), range(2000)))
    finally:
        sys.setswitchinterval(interval)
    for each in found:
        torch.testing.assert_close(each, expected)


@torch.no_grad()
def evaluated(model, x):
    return model(x)


class Interrupted(nn.Module):
    """Passes its input on, or behaves as when somebody presses Ctrl-C."""

    now = False

    def forward(self, x):
        if self.now:
            raise KeyboardInterrupt
        return x


def test_a_pass_after_an_interrupted_one_chooses_anew():
    model = nn.Sequential(nn.Linear(8, 8), Interrupted(), nn.Linear(8, 2))
    sparsify(model, 0.25)
    model[1].now = True
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(2, 8))
    model[1].now = False
    changed = {name: torch.randn_like(value) for name, value in model.state_dict().items() if name.endswith("original")}
    model.load_state_dict(changed, strict=False)
    model.eval()
    x = torch.randn(2, 8)
    state = dense_state_dict(model)
    found = model(x)
    assert torch.equal(state["0.weight"], model[0].weight)
    torch.testing.assert_close(
        found, F.linear(F.linear(x, model[0].weight, model[0].bias), model[2].weight, model[2].bias)
    )


def test_densify_after_an_interrupted_pass():
    model = nn.Sequential(nn.Linear(8, 8), Interrupted())
    sparsify(model, 0.25)
    model[1].now = True
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(2, 8))
    weight = torch.randn(8, 8)
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(weight)
    densify(model)
    strongest = weight.abs() >= weight.abs().flatten().topk(16).values[-1]
    assert torch.equal(model[0].weight, weight * strongest)


class Twice(nn.Module):
    """Calls itself once more."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, again=True):
        return self.layer(self(x, again=False) if again else x)


def test_a_module_that_calls_itself_chooses_once():
    model = Twice()
    sparsify(model, 0.25, "targeted_dropout")
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    with patch.object(WeightGraph, "masks", autospec=True, side_effect=WeightGraph.masks) as chosen:
        model(x)
    assert chosen.call_count == 1
