"""Runs that go on in less usual ways: with averages, elsewhere, at their end, after a failure in a last hook."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from test_checkpoints import STEPS, CrashError, crash, crash_at, without_time
from torch import Tensor, nn

from dnw_graph import InputError, sparsify
from dnw_graph.data.sources import ImageData
from dnw_graph.loading import ModelFile
from dnw_graph.ranking import rankings
from dnw_graph.recipes.options import RunOptions
from dnw_graph.training import SCHEDULES, Classifier, DataModule, Stopped, read_checkpoint, run
from dnw_graph.training.resuming import start_from

Create = Callable[[int, int], nn.Module]
Options = Callable[..., RunOptions]


@pytest.mark.parametrize("way", ["signal", "failure"])
def test_a_stop_within_an_evaluation_keeps_weights_and_average_apart(
    way: str, create: Create, small_digits: ImageData, options: Options, tmp_path: Path
):
    unbroken = run(create, {}, options(ema=0.9, output=str(tmp_path / "unbroken")), small_digits)
    chosen = options(ema=0.9)
    act = crash if way == "failure" else lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(CrashError if way == "failure" else Stopped):
        run(crash_at(create, False, 2, act), {}, chosen, small_digits)
    last = f"{chosen.output}/last.ckpt"
    resumed = run(create, {}, replace(chosen, resume=last), small_digits)
    assert without_time(resumed) == without_time(unbroken)
    content, expected = read_checkpoint(last), read_checkpoint(tmp_path / "unbroken" / "last.ckpt")
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, expected[part][name]) for name, value in content[part].items())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_double_precision_survives_a_stop(
    ema: float, create: Create, small_digits: ImageData, options: Options, tmp_path: Path
):
    chosen = options(precision="64-true", ema=ema)
    unbroken = run(create, {}, replace(chosen, output=str(tmp_path / "unbroken")), small_digits)
    with pytest.raises(CrashError):
        run(crash_at(create, True, 7, crash), {}, chosen, small_digits)
    last = f"{chosen.output}/last.ckpt"
    assert without_time(run(create, {}, replace(chosen, resume=last), small_digits)) == without_time(unbroken)
    content, expected = (read_checkpoint(at)["state_dict"] for at in (last, tmp_path / "unbroken" / "last.ckpt"))
    assert all(torch.equal(value, expected[name]) for name, value in content.items())
    weight = content["model.graph.candidates.weight"]
    assert weight.dtype == torch.float64
    assert not torch.equal(weight, weight.float().double())
    evaluated = run(create, {}, options(evaluate=last, output=None, export=str(tmp_path / "x.pt2")), small_digits)
    assert evaluated.top1 == unbroken.top1


def test_another_output_must_not_hold_a_run(create: Create, small_digits: ImageData, options: Options, tmp_path: Path):
    first, other = options(epochs=1), options(epochs=1, seed=3, output=str(tmp_path / "other"))
    for chosen in (first, other):
        run(create, {}, chosen, small_digits)
    before = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir() if path.is_file()}
    with pytest.raises(InputError, match="other already holds a run"):
        run(create, {}, replace(first, resume=f"{first.output}/last.ckpt", output=other.output), small_digits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir() if path.is_file()} == before


def test_the_best_epoch_goes_along_to_another_output(
    create: Create, small_digits: ImageData, options: Options, tmp_path: Path
):
    chosen = options(held_out=20)
    with pytest.raises(CrashError):
        run(crash_at(create, True, 7, crash), {}, chosen, small_digits)
    here, there = Path(str(chosen.output)), tmp_path / "there"
    best = (here / "best.ckpt").read_bytes()
    resume = replace(chosen, resume=str(here / "last.ckpt"), output=str(there))
    alone = tmp_path / "alone" / "last.ckpt"
    alone.parent.mkdir()
    shutil.copy(here / "last.ckpt", alone)
    with pytest.raises(InputError, match=r"best\.ckpt is missing: it is the best epoch so far"):
        run(create, {}, replace(resume, resume=str(alone), output=str(tmp_path / "nowhere")), small_digits)
    elsewhere = run(create, {}, resume, small_digits)
    assert (here / "best.ckpt").read_bytes() == best
    assert without_time(elsewhere) == without_time(run(create, {}, replace(resume, output=None), small_digits))


def test_a_run_resumed_at_its_end_says_and_writes_the_same(create: Create, small_digits: ImageData, options: Options):
    chosen = options(ema=0.9)
    finished = run(create, {}, chosen, small_digits)
    table, here = Path(f"{chosen.output}/metrics.csv"), Path(str(chosen.output))
    before, wiring = table.read_text(), torch.load(here / "wiring" / "tiny.pt")["edge_index"]
    last = here / "last.ckpt"
    weights = [read_checkpoint(last)[part] for part in ("state_dict", "current_model_state")]
    assert not torch.equal(*(each["model.graph.candidates.weight"] for each in weights))
    again = run(create, {}, replace(chosen, resume=str(last), pictures=True), small_digits)
    assert without_time(again) == without_time(finished)
    assert table.read_text() == before
    assert torch.equal(torch.load(here / "wiring" / "tiny.pt")["edge_index"], wiring)
    assert list((here / "pictures").glob("*.gif"))


def test_an_evaluation_that_is_repeated_is_logged_once(
    create: Create, small_digits: ImageData, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    unbroken = run(create, {}, options(output=str(tmp_path / "unbroken")), small_digits)
    chosen = options()

    def fail(self: Callback, trainer: Any, module: Any) -> None:
        if trainer.global_step == 2 * STEPS:
            raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr("dnw_graph.callbacks.wiring_recorder.WiringRecorder.on_train_epoch_end", fail)
        with pytest.raises(CrashError):
            run(create, {}, chosen, small_digits)
    resumed = run(create, {}, replace(chosen, resume=f"{chosen.output}/last.ckpt"), small_digits)
    assert without_time(resumed) == without_time(unbroken)
    rows = [
        list(csv.DictReader(Path(f"{at}/metrics.csv").read_text().splitlines()))
        for at in (chosen.output, tmp_path / "unbroken")
    ]
    assert [row["val/top1"] for row in rows[0]] == [row["val/top1"] for row in rows[1]]


class Sparse(nn.Sequential):
    """Convolution and classifier with one ranking."""

    def __init__(self, num_classes: int) -> None:
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Linear(8, num_classes))
        sparsify(self, 0.5, "random_graph", distribution="global")


def test_other_classes_cannot_share_a_ranking(small_digits: ImageData, options: Options):
    chosen = options(epochs=1)
    run(lambda classes, size: Sparse(classes), {}, chosen, small_digits)
    file = ModelFile(Path(f"{chosen.output}/last.ckpt"))
    with pytest.raises(InputError, match="all layers share one ranking with the classifier"):
        start_from(Sparse(3), lambda classes, size: Sparse(classes), file, ["0", "1", "2"])


class Wrapped(nn.Module):
    """A model under its only attribute."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_parts_under_one_attribute_are_loaded_where_they_fit(small_digits: ImageData, options: Options):
    chosen = options(epochs=1, image_size=8)
    run(lambda classes, size: Wrapped(classes), {}, chosen, small_digits)
    file = ModelFile(Path(f"{chosen.output}/last.ckpt"))
    trained = file.model(lambda classes, size: Wrapped(classes))
    new = Wrapped(3)
    before = new.net[2].weight.clone()
    start_from(new, lambda classes, size: Wrapped(classes), file, ["0", "1", "2"])
    assert torch.equal(new.net[1].weight, trained.net[1].weight)
    assert torch.equal(new.net[2].weight, before)


def test_schedules_of_rules_start_anew_from_a_trained_model(small_digits: ImageData, options: Options):
    def create(classes: int, size: int) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
        sparsify(model, 0.2, "rigl")
        return model

    chosen = options(epochs=1, image_size=8, ema=0.5)
    run(create, {}, chosen, small_digits)
    file = ModelFile(Path(f"{chosen.output}/last.ckpt"))
    state = file.model(create).state_dict()
    steps = [int(value) for name, value in state.items() if name.endswith(".step")]
    assert steps == [len(small_digits.train) // chosen.batch_size]
    new = create(10, 8)
    start_from(new, create, file, small_digits.classes)
    assert [graph.wiring.step for _, graph in rankings(new)] == [0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"accumulate_grad_batches": 2}, "accumulate_grad_batches must stay 1: give accumulate to Classifier"),
    ({"callbacks": [GradientAccumulationScheduler({1: 2})]}, "accumulate_grad_batches must stay 1"),
    ({"overfit_batches": 2}, "overfit_batches is 2"),
    ({"overfit_batches": 1.0}, "overfit_batches is 1.0"),
    ({"limit_train_batches": STEPS - 1}, f"limit_train_batches is {STEPS - 1}, less than all {STEPS} batches"),
    ({"limit_train_batches": 0.5}, "limit_train_batches is 0.5"),
]


@pytest.mark.parametrize(("wrong", "told"), REFUSED)
def test_a_data_module_is_for_trainers_that_take_whole_epochs_step_by_step(
    wrong: dict[str, Any], told: str, small_digits: ImageData, options: Options
):
    with pytest.raises(InputError, match=told):
        fit(DataModule(small_digits, options(image_size=8)), **wrong)


@pytest.mark.parametrize("right", [{"limit_train_batches": STEPS}, {"limit_train_batches": 1.0}, {"fast_dev_run": 2}])
def test_other_limits_of_a_trainer_will_do(right: dict[str, Any], small_digits: ImageData, options: Options):
    fit(DataModule(small_digits, options(image_size=8)), **right)


def test_a_batch_is_a_multiple_of_the_processes(small_digits: ImageData, options: Options):
    data = DataModule(small_digits, options(batch_size=16))
    data.trainer = Mock(world_size=3, callbacks=[], accumulate_grad_batches=1, overfit_batches=0.0, fast_dev_run=True)
    with pytest.raises(InputError, match="3 processes cannot share a batch of 16 images evenly: give a batch_size"):
        data.train_dataloader()


def fit(data: DataModule, **options: Any) -> None:
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), 10, SCHEDULES["cosine"](10), 0.1, 0.9, 0.0, 0)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=1, accelerator="cpu", **options, **quiet).fit(module, data)


def test_a_single_sparse_weight_is_loaded_or_not_as_a_whole(small_digits: ImageData, options: Options):
    def create(classes: int, size: int) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes, bias=False))
        sparsify(model, 0.2)
        return model

    chosen = options(epochs=1, image_size=8)
    run(create, {}, chosen, small_digits)
    file = ModelFile(Path(f"{chosen.output}/last.ckpt"))
    new = create(3, 8)
    before = new[1].weight.clone()
    start_from(new, create, file, ["0", "1", "2"])
    assert torch.equal(new[1].weight, before)
