from __future__ import annotations

import csv
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from dnw_graph.analysis.silent import silent_nodes
from dnw_graph.callbacks.wiring_monitor import edges_swapped, real_edges
from dnw_graph.training import ImageData, RunOptions, run


def test_edges_swapped_counts_new_edges():
    before = {"a": torch.tensor([0, 2, 5]), "b": torch.tensor([1, 2])}
    now = {"a": torch.tensor([1, 2, 6]), "b": torch.tensor([1, 2])}
    assert edges_swapped(before, now) == {"a": 2, "b": 0}


def test_real_edges_are_those_of_the_graph(create: Callable[[int, int], nn.Module]):
    model = create(10, 8)
    weight = model.graph.candidates.weight
    assert set(real_edges(model)["tiny"].tolist()) == set(weight.detach().abs().topk(40).indices.tolist())


@pytest.mark.slow
def test_logged_swaps_and_live_nodes_against_sets_of_pairs(
    create: Callable[[int, int], nn.Module],
    small_digits: ImageData,
    options: Callable[..., RunOptions],
    monkeypatch: pytest.MonkeyPatch,
):
    wirings: list[set[tuple[int, int]]] = []
    live: list[float] = []

    def look(model: nn.Module) -> None:
        pairs = {(int(u), int(v)) for u, v in model.graph.edge_index.T}
        reached = set(range(16, 22))
        for _ in range(22):
            reached |= {u for u, v in pairs if v in reached}
        wirings.append(pairs)
        live.append(len(reached) / 22)

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            look(pl_module.model)

        def on_train_epoch_end(self, trainer, pl_module):
            look(pl_module.model)

    from dnw_graph.training import run as module_run  # the function; its module is patched below

    assert module_run is run
    import sys

    module = sys.modules["dnw_graph.training.runs"]
    make = module.make_trainer
    monkeypatch.setattr(
        module, "make_trainer", lambda options, callbacks, *rest: make(options, [*callbacks, Look()], *rest)
    )
    chosen = options()
    summary = run(create, {}, chosen, small_digits)
    with open(Path(chosen.output or "") / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["wiring/edges_swapped"]]
    swapped = [len(now - before) for before, now in pairwise(wirings)]
    assert sum(swapped) > 0
    names = sorted(rows[0])
    # Stores of files have a folder per slash, as MLflow's.
    assert not [(a, b) for a in names for b in names if b.startswith(f"{a}/")]
    assert [int(float(row["wiring/edges_swapped"])) for row in rows] == swapped
    assert [int(float(row["wiring/tiny/edges_swapped"])) for row in rows] == swapped
    assert [float(row["wiring/live_nodes"]) for row in rows] == pytest.approx(live[1:])
    assert [float(row["wiring/tiny/live_nodes"]) for row in rows] == pytest.approx(live[1:])
    assert summary.graphs["tiny"].edges_swapped == len(wirings[-1] - wirings[0])
    assert summary.graphs["tiny"].dead_nodes == round((1 - live[-1]) * 22)


def test_a_model_without_graphs_logs_no_wiring(small_digits: ImageData, options: Callable[..., RunOptions]):
    def plain(num_classes: int, image_size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

    chosen = options(epochs=1)
    summary = run(plain, {}, chosen, small_digits)
    assert "wiring" not in (Path(chosen.output or "") / "metrics.csv").read_text()
    assert summary.graphs == {}
    assert not any(word in line for line in summary.lines() for word in ("edge", "node"))
    assert not (Path(chosen.output or "") / "wiring").exists()


def test_silent_blocks_are_warned_of_once(
    create: Callable[[int, int], nn.Module], small_digits: ImageData, options: Callable[..., RunOptions]
):
    models = []

    def starved(num_classes: int, image_size: int) -> nn.Module:
        model = create(num_classes, image_size)
        candidates = model.graph.candidates
        inner = torch.cartesian_prod(torch.arange(4), torch.arange(4, 16)).t()
        with torch.no_grad():  # all 40 edges lead to the inner nodes
            candidates.weight[candidates.flat_index(inner)] += 3
        models.append(model)
        return model

    chosen = options(epochs=2, lr=1e-9)
    with pytest.warns(
        UserWarning, match=r"step \d+: no real edge arrives at 6 of the 6 nodes of block 2 of tiny"
    ) as caught:
        run(starved, {}, chosen, small_digits)
    assert len([each for each in caught if "no real edge" in str(each.message)]) == 1
    with open(Path(chosen.output or "") / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["wiring/edges_swapped"]]
    silent = silent_nodes(models[0])["tiny"].float().mean().item()
    assert silent == pytest.approx(6 / 22)
    largest = models[0].graph.candidates.weight.detach().abs().max().item()
    for row in rows:
        for of in ("wiring", "wiring/tiny"):
            assert float(row[f"{of}/silent_nodes"]) == pytest.approx(silent)
            assert float(row[f"{of}/largest_weight"]) == pytest.approx(largest)
