"""The benchmarks of training: what the floor counts, what memory is measured, and the scripts from end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dnw_graph import Continuous, Discrete, NeuralGraph
from dnw_graph.models import MobileNetV1DNW, TinyClassifier
from dnw_graph.node_functions import NormReluConv

SCRIPTS = ("reference_formulation", "roofline", "growth", "train_step", "memory", "inference", "recorder")


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return {name: __import__(name) for name in SCRIPTS}
    finally:
        sys.path.remove(folder)


def total(groups: list, *kinds: str) -> tuple[float, float]:
    """Operations and bytes of some kinds of groups."""
    found = [group for group in groups if group.kind in kinds]
    assert {group.kind for group in found} == set(kinds)
    return sum(group.operations for group in found), sum(group.moved for group in found)


@pytest.mark.parametrize("make", [partial(MobileNetV1DNW, 0.225, 10, 1), partial(TinyClassifier, "static")])
def test_operations_are_those_that_pytorch_counts_for_dense_products(scripts: dict[str, ModuleType], make: partial):
    model, images = make(), torch.randn(2, 3, 32, 32)
    reference = scripts["reference_formulation"].from_ours(model)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        reference(images)
    groups = scripts["roofline"].groups(model, images, torch.float32)
    # A candidate's gradient costs what a dense product costs in the forward pass.
    dense, nodes = total(groups, "candidate gradient")[0], total(groups, "node function")[0]
    layers = total(groups, "forward")[0]
    assert forward.get_total_flops() == dense + nodes + layers
    with FlopCounterMode(display=False) as first, torch.no_grad():
        next(layer for layer in reference.stem.modules() if isinstance(layer, nn.Conv2d))(images)
    assert total(groups, "gradient of the weight")[0] == layers
    assert total(groups, "gradient of the input")[0] == layers - first.get_total_flops()


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_static_graph_counted_by_hand(scripts: dict[str, ModuleType], norm: str, dtype: torch.dtype):
    graph = NeuralGraph((2, 3, 5), 12, stride=2, node_function=partial(NormReluConv, norm=norm))
    groups = scripts["roofline"].groups(graph, torch.randn(7, 2, 6, 6), dtype)
    # Numbers in a map of the whole batch before the stride of the inputs' functions, and after it.
    before, after = 7 * 6 * 6 * dtype.itemsize, 7 * 3 * 3 * dtype.itemsize
    products = (2 + 3) * after + (5 + 5) * after
    assert total(groups, "product")[1] == products + 12 * 8
    assert total(groups, "candidate gradient") == (2 * (2 * 3 + 5 * 5) * 7 * 9, products + (2 * 3 + 5 * 5) * 4)
    if norm == "batch":
        node_function = 2 * (before + after) + 3 * (after + after)
        # The inputs gather from 3 + 5 nodes, the block from 5. Pass one: read I, write ∂L/∂Z; pass two: read both and
        # write ∂L/∂I.
        backward = 8 * after + 2 * (before + after + after + before + before) + 5 * after + 3 * 5 * after
    else:
        node_function = 2 * (before + after) + 3 * after
        backward = 8 * after + 2 * (before + before) + 5 * after + 3 * (after + after)
    assert total(groups, "node function")[1] == node_function
    # All edges come from nodes with a function, whose convolution has two gradients of 9 multiply-adds.
    assert total(groups, "backward of states") == (2 * 7 * 9 * (12 + 18 * (2 + 3)), backward)
    assert total(groups, "selection") == (0, 31 * 4)
    parameters = 31 + (2 + 3) * (9 + 2)
    assert total(groups, "optimiser") == (0, 5 * 4 * parameters)


def test_rules_that_leave_hallucinated_edges_alone_need_no_dense_gradient(scripts: dict[str, ModuleType]):
    graph = NeuralGraph((2, 3, 5), 12, wiring="random_graph")
    groups = scripts["roofline"].groups(graph, torch.randn(1, 2, 4, 4), torch.float32)
    assert total(groups, "candidate gradient")[0] == total(groups, "product")[0] == 2 * 12 * 16


def test_a_discrete_graph_starts_with_its_inputs_and_ends_with_its_outputs(scripts: dict[str, ModuleType]):
    graph = NeuralGraph(num_nodes=9, num_inputs=2, num_outputs=3, num_edges=30, dynamics=Discrete(steps=3))
    groups = scripts["roofline"].groups(graph, torch.randn(1, 2, 4, 4), torch.float32)
    pairs = 2 * 9 + 9 * 9 + 9 * 3
    assert total(groups, "candidate gradient")[0] == 2 * pairs * 16
    edges = set(map(tuple, graph.edge_index.t().tolist()))
    used = sum((u < 2) + 1 + (v >= 6) for u, v in edges)
    assert total(groups, "product")[0] == 2 * used * 16


def test_every_evaluation_of_a_continuous_graph_counts(scripts: dict[str, ModuleType]):
    graph = NeuralGraph(num_nodes=9, num_inputs=2, num_outputs=3, num_edges=30, dynamics=Continuous())
    calls = []
    graph.dynamics.node_function.register_forward_hook(lambda *_: calls.append(1))
    groups = scripts["roofline"].groups(graph, torch.randn(1, 2, 4, 4), torch.float32)
    assert len(calls) > 6
    assert total(groups, "candidate gradient")[0] == 2 * 16 * (2 * 9 + (len(calls) - 1) * 81)


def test_a_group_takes_the_longer_of_computing_and_moving(scripts: dict[str, ModuleType]):
    roofline = scripts["roofline"]
    machine = roofline.Machine(peak=100, bandwidth=10)
    groups = [roofline.Group("a", "b", 50, 1), roofline.Group("a", "b", 1, 20)]
    assert roofline.floor(groups, machine) == 1e3 * (0.5 + 2)
    (row,) = roofline.summary(groups, machine)
    assert (row["floor, ms"], row["bound by"]) == (2500, "bandwidth")


@pytest.mark.parametrize("recomputed", [False, True])
def test_memory_of_a_small_network_counted_by_hand(scripts: dict[str, ModuleType], recomputed: bool):
    layers = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    class Network(nn.Module):
        def forward(self, x):
            return head(checkpoint(layers, x, use_reentrant=False) if recomputed else layers(x))

    images, labels = torch.randn(4, 3, 64, 64), torch.randint(16, (4,))
    kept, peak = scripts["memory"].kept_and_peak(Network(), images, labels)
    maps = 4 * 16 * 64 * 64 * 4
    # ReLU keeps its output; the convolution's input is the batch itself. Checkpointed, nothing is kept.
    assert kept == pytest.approx(0 if recomputed else maps, abs=0.01 * maps)
    # Together with the convolution's output in the forward pass, with gradients in the backward pass.
    assert 1.99 * maps < peak < 4.01 * maps


SHORT = ("--batch=4", "--rounds=1", "--threads=1")


def run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, path: Path, *argv: str, short: Sequence[str] = SHORT
) -> dict:
    monkeypatch.setattr(sys, "argv", [str(script.__file__), *short, f"--json={path}", *argv])
    script.main()
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_step_is_timed_beside_the_reference_and_the_floor(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ("--models", "tiny_static", "--propagation", "auto", "block", "--roofline")
    saved = run(scripts["train_step"], monkeypatch, tmp_path / "step.json", *argv)
    rows = {row["step"]: row for row in saved["rows"]}
    assert list(rows) == ["reference formulation", "dnw_graph", "dnw_graph, block"]
    for row in rows.values():
        assert row["reference / this"] == pytest.approx(rows["reference formulation"]["ms"] / row["ms"])
        assert row["share of the floor reached"] == pytest.approx(row["floor, ms"] / row["ms"])
    assert "candidate gradient" in capsys.readouterr().out


@pytest.mark.slow
def test_the_recorder_is_timed_beside_the_steps(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    saved = run(scripts["recorder"], monkeypatch, tmp_path / "recorder.json", "--every", "1", "2")
    assert [row["n"] for row in saved["rows"]] == [1, 2]
    for row in saved["rows"]:
        expected = row["moment, ms"] / (row["n"] * row["step, ms"])
        assert float(row["share"].rstrip("%")) / 100 == pytest.approx(expected, abs=1e-4)
        assert row["born and gone, last"] > 0


@pytest.mark.slow
def test_a_model_with_another_loss_is_not_timed(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch):
    def other(model, layout):
        reference = scripts["reference_formulation"].from_ours(model, layout)
        reference.graphs[0].num_edges -= 100
        return reference

    monkeypatch.setattr(scripts["train_step"], "from_ours", other)
    with pytest.raises(AssertionError, match="differs from the reference formulation"):
        run(scripts["train_step"], monkeypatch, Path("unused.json"), "--models", "tiny_static")


@pytest.mark.slow
def test_another_loss_in_half_precision_is_found_out(scripts: dict[str, ModuleType]):
    def other(model, layout):
        reference = scripts["reference_formulation"].from_ours(model, layout)
        reference.register_forward_hook(lambda _, __, y: 30 * y if torch.is_autocast_enabled("cpu") else y)
        return reference

    steps, batch = sys.modules["steps"], (torch.randn(4, 3, 32, 32), torch.tensor([3, 7, 7, 0]))
    ways = {"auto": TinyClassifier("static")}
    steps.check_case(steps.Case("right", ways, scripts["reference_formulation"].from_ours, *batch), torch.bfloat16)
    steps.check_case(steps.Case("float32 alone", ways, other, *batch), torch.float32)
    with pytest.raises(AssertionError, match="reference formulation"):
        steps.check_case(steps.Case("other", ways, other, *batch), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_that_loses_a_gradient_is_found(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    def losing(model):
        model.graph.candidates.weight.register_hook(torch.zeros_like)
        return model

    steps, batch = sys.modules["steps"], (torch.randn(4, 3, 32, 32), torch.tensor([3, 7, 7, 0]))
    ways = {"dnw_graph": TinyClassifier("static")}
    case = steps.Case("tiny", ways, scripts["reference_formulation"].from_ours, *batch)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    steps.check_case(case, dtype, compiled=True)
    monkeypatch.setattr(torch, "compile", losing)
    with pytest.raises(AssertionError, match=r"tiny: compiled, the gradient of graph.candidates.weight .* 1.0e\+00"):
        steps.check_case(case, dtype, compiled=True)


@pytest.mark.slow
def test_growth_is_timed_and_drawn(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(scripts["growth"], "BLOCKS", (8, 12, 16))
    monkeypatch.setattr(scripts["growth"], "EDGES", 16)
    saved = run(scripts["train_step"], monkeypatch, tmp_path / "g.json", "--growth", str(tmp_path / "growth.png"))
    candidates = [row["candidates"] for row in saved["rows"]]
    assert candidates == [104, 416, 1664, 416, 416, 416, 416]
    assert [row["real edges"] for row in saved["rows"]] == [16, 16, 16, 4, 16, 64, 256]
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_memory_has_a_row_for_every_formulation(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    measured, own = scripts["memory"].kept_and_peak, []

    def kept_and_peak(model: nn.Module, *args: object) -> tuple[int, int]:
        own.extend([model.graph.candidates.weight.detach()] if isinstance(model, TinyClassifier) else [])
        return measured(model, *args)

    monkeypatch.setattr(scripts["memory"], "kept_and_peak", kept_and_peak)
    argv = ("--models", "tiny_static")
    saved = run(scripts["memory"], monkeypatch, tmp_path / "memory.json", *argv, short=SHORT[:1])
    # The reference formulation keeps I, the normalised and the sent maps of 800 nodes, and the outputs' part.
    least = 3 * 800 * 64 * 4 / 1e6
    for row in saved["rows"]:
        if row["step"].startswith("reference"):
            assert least < row["kept, MB per image"] < 2 * least
        assert row["kept, MB per image"] < row["peak, MB per image"]
    assert len(own) == 4
    assert all(torch.equal(weight, own[0]) for weight in own)


def test_outputs_that_differ_are_found_out(scripts: dict[str, ModuleType]):
    inference, layer = scripts["inference"], nn.Linear(3, 5)
    models = {"random graph, reference formulation": layer, "random graph, sparse": layer, "MobileNetV1": nn.Identity()}
    inference._check(models, torch.randn(2, 3))
    with pytest.raises(AssertionError, match="random graph, sparse differs"):
        inference._check({**models, "random graph, sparse": nn.Linear(3, 5)}, torch.randn(2, 3))
