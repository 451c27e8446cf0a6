"""What a checkpoint of the right checksum must hold for a run to go on: all of it, built as this run builds it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from tiny import create_tiny

from dnw_graph import DNW, InputError
from dnw_graph.ranking import rule_hash
from dnw_graph.structure import match
from dnw_graph.training import (
    SCHEDULES,
    Checkpoints,
    Classifier,
    ImageData,
    RunOptions,
    TrainingCost,
    WiringMonitor,
    WiringRecorder,
    read_checkpoint,
    run,
)
from dnw_graph.training.checkpoints import WholeFileIO
from dnw_graph.training.resuming import check_resumable, check_weights
from dnw_graph.wirings import WIRINGS

STEPS = 4  # of an epoch
IDENTITY = {"wiring": "dnw"}


def options(directory: Path, **changes: Any) -> RunOptions:
    values = {"image_size": 8, "batch_size": 16, "epochs": 2, "lr": 0.3, "accelerator": "cpu", "workers": 0}
    return RunOptions(**{**values, "output": str(directory), "save_every": 3, **changes})


@pytest.fixture(scope="module")
def directory(small_digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    directory = tmp_path_factory.mktemp("run")
    run(create_tiny, IDENTITY, options(directory), small_digits)
    return directory


Check = Callable[[dict[str, Any]], None]


def classifier(optimizer: str = "sgd") -> Classifier:
    return Classifier(create_tiny(10, 8), 10, SCHEDULES["cosine"](2 * STEPS), 0.3, 0.9, 5e-5, 0, optimizer=optimizer)


def checking(directory: Path, optimizer: str = "sgd", plugins: Sequence[Any] = ()) -> Check:
    """What a run like it checks before it goes on."""
    module = classifier(optimizer)
    model = module.model
    callbacks = [WiringMonitor(model), WiringRecorder(model=model), TrainingCost(model), Checkpoints(directory, 3, {})]
    quiet = {"logger": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", callbacks=callbacks, plugins=list(plugins), **quiet)
    return lambda checkpoint: check_resumable("last.ckpt", checkpoint, trainer, callbacks, module, STEPS)


@pytest.fixture
def check(directory: Path) -> Check:
    return checking(directory)


@pytest.mark.parametrize("name", ["first.ckpt", "best.ckpt", "last.ckpt"])
def test_every_checkpoint_of_a_run_will_do(directory: Path, check: Check, name: str):
    check(read_checkpoint(directory / name))


def test_so_does_one_within_an_epoch(small_digits: ImageData, tmp_path: Path, check: Check):
    class StoppedError(Exception):
        pass

    def create(classes: int, image_size: int) -> torch.nn.Module:
        model = create_tiny(classes, image_size)
        steps = iter(range(100))

        def stop(*args: Any) -> None:
            if model.training and next(steps) == 5:
                raise StoppedError

        model.register_forward_pre_hook(stop)
        return model

    with pytest.raises(StoppedError):
        run(create, IDENTITY, options(tmp_path, save_every=1), small_digits)
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == 5
    check(checkpoint)


def at(content: Any, way: str) -> tuple[Any, Any]:
    """Return the container of a place and its key there."""
    *parts, last = way.split("/")
    for part in parts:
        content = content[int(part) if part.isdigit() else part]
    return content, int(last) if last.isdigit() else last


WEIGHT, MOMENTUM = "state_dict/model.graph.candidates.weight", "optimizer_states/0/state/8/momentum_buffer"
NEEDED = [
    WEIGHT,
    "state_dict/model.graph.dynamics.node_functions.0.norm.num_batches_tracked",
    MOMENTUM,
    "optimizer_states/0",
    "optimizer_states/0/param_groups/0",
    *(f"optimizer_states/0/param_groups/0/{name}" for name in ("params", "lr", "momentum", "initial_lr")),
    "optimizer_states/0/param_groups/0/params/3",
    "optimizer_states",
    "lr_schedulers/0",
    "lr_schedulers/0/last_epoch",
    "callbacks",
    *(f"callbacks/{name}" for name in ("WiringMonitor", "TrainingCost", "Checkpoints")),
    "callbacks/WiringRecorder/recording",
    "callbacks/WiringMonitor/initial/tiny",
    "callbacks/TrainingCost/graphs/tiny",
    *(f"callbacks/Checkpoints/{name}" for name in ("best_top1", "best_epoch", "seconds", "epoch_complete")),
    "loops/fit_loop/epoch_progress",
    "loops/fit_loop/epoch_loop.batch_progress/current/ready",
    "loops/fit_loop/epoch_loop.automatic_optimization.optim_progress/optimizer/step/total",
]


@pytest.mark.parametrize("way", NEEDED)
def test_nothing_may_be_missing_or_of_another_kind(directory: Path, check: Check, way: str):
    whole = read_checkpoint(directory / "last.ckpt")
    for wrong in (None, "x", [], {"a": 1}, math.nan, math.inf, True, torch.zeros(3, 7)):
        checkpoint = copy.deepcopy(whole)
        container, key = at(checkpoint, way)
        if type(wrong) is type(container[key]) and not isinstance(wrong, float | torch.Tensor):
            continue
        if way.endswith("best_top1") and wrong is None:  # no epoch was evaluated
            continue
        container[key] = wrong
        refused(check, checkpoint)
    container, key = at(whole, way)
    del container[key]
    refused(check, whole)


def refused(check: Check, checkpoint: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"last\.ckpt") as error:
        check(checkpoint)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("way", "change"),
    [
        (WEIGHT, lambda value: value[:-1]),
        (WEIGHT, lambda value: value.long()),
        (WEIGHT, lambda value: value.index_fill(0, torch.tensor([3]), torch.nan)),
        (MOMENTUM, lambda value: value[None]),
        (MOMENTUM, lambda value: value / 0),
        ("optimizer_states/0/state", lambda value: {}),
        ("optimizer_states/0/state", lambda value: {**value, 99: value[0]}),
        ("optimizer_states/0/param_groups/0/momentum", lambda value: 0.5),
        ("optimizer_states/0/param_groups/0/params", lambda value: value[::-1]),
        ("lr_schedulers/0/last_epoch", lambda value: value + 1),
        ("global_step", lambda value: value - 1),
        ("callbacks/WiringMonitor/initial/tiny", lambda value: value.flip(0)),
        ("callbacks/WiringMonitor/epoch_start/tiny", lambda value: value + 1000),
        ("callbacks/WiringMonitor/epoch_start/tiny", lambda value: value.long()),
        ("callbacks/WiringMonitor/initial", lambda value: {}),
        ("callbacks/WiringRecorder/recording", lambda value: value[:-1]),
        ("callbacks/WiringRecorder/recording", lambda value: value.index_fill(0, torch.tensor([99]), 0)),
        ("callbacks/TrainingCost/multiply_adds", lambda value: -1),
        ("callbacks/Checkpoints/epoch_complete", lambda value: not value),
        ("loops/fit_loop/epoch_progress/current/completed", lambda value: value - 1),
        ("loops/fit_loop/epoch_loop.batch_progress/is_last_batch", lambda value: not value),
    ],
)
def test_values_that_cannot_be(directory: Path, check: Check, way: str, change: Callable[[Any], Any]):
    checkpoint = read_checkpoint(directory / "last.ckpt")
    container, key = at(checkpoint, way)
    container[key] = change(container[key])
    refused(check, checkpoint)


def test_the_state_of_an_optimiser_need_not_have_the_shapes_of_parameters(directory: Path):
    check, checkpoint = checking(directory, "torch.optim.Adafactor"), read_checkpoint(directory / "last.ckpt")
    module = classifier("torch.optim.Adafactor")
    optimizer = module.configure_optimizers()["optimizer"]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint["optimizer_states"] = [optimizer.state_dict()]
    check(checkpoint)
    state = checkpoint["optimizer_states"][0]["state"]
    factored = next(each for each in state.values() if "row_var" in each)
    rows = factored["row_var"]
    for wrong in (rows / 0, {"x": [rows / 0]}):
        factored["row_var"] = wrong
        refused(check, checkpoint)
    factored["row_var"] = rows
    state[99] = factored
    refused(check, checkpoint)


def test_a_scaler_may_have_skipped_every_step_so_far(directory: Path, check: Check):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    checkpoint = read_checkpoint(directory / "last.ckpt")
    checkpoint["optimizer_states"][0]["state"] = {}
    checkpoint["MixedPrecision"] = plugin.state_dict()
    refused(check, checkpoint)
    checking(directory, plugins=[plugin])(checkpoint)


def test_what_a_version_of_pytorch_adds_or_drops_is_no_matter(directory: Path, check: Check):
    checkpoint = read_checkpoint(directory / "last.ckpt")
    del checkpoint["optimizer_states"][0]["param_groups"][0]["foreach"]
    checkpoint["optimizer_states"][0]["param_groups"][0]["new"] = None
    checkpoint["lr_schedulers"][0]["verbose"] = False
    check(checkpoint)


def test_older_checkpoints_without_counts_of_parts_and_sparse_layers_will_do(directory: Path, check: Check):
    checkpoint = read_checkpoint(directory / "last.ckpt")
    for name in ("parts", "sparse_layers"):
        del checkpoint["callbacks"]["TrainingCost"][name]
    check(checkpoint)


class Own(DNW):
    """A rule of one's own."""


def create_own(classes: int, image_size: int) -> torch.nn.Module:
    model = create_tiny(classes, image_size)
    model.graph.rewire(Own(), 40)
    return model


def test_a_rule_of_ones_own_is_registered_or_named_again(
    directory: Path, check: Check, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = read_checkpoint(directory / "last.ckpt")
    checkpoint["state_dict"]["model.graph.rule"] = torch.tensor(rule_hash(Own))
    with pytest.raises(InputError, match=r"tiny was trained with a rule that is not registered here .*with 'dnw'"):
        check(checkpoint)
    monkeypatch.setitem(WIRINGS, "mine", Own)
    checkpoint["state_dict"]["model.graph.rule"] = torch.tensor(rule_hash(Own))
    with pytest.raises(InputError, match=r"last\.ckpt: tiny was trained with 'mine', .*: give the same rule"):
        check(checkpoint)


@pytest.mark.slow
def test_a_run_with_a_rule_of_ones_own_goes_on_with_it(small_digits: ImageData, tmp_path: Path):
    summary = run(create_own, {}, options(tmp_path), small_digits)
    resume = options(tmp_path, resume=str(tmp_path / "last.ckpt"))
    with pytest.raises(InputError, match="not registered here"):
        run(create_tiny, {}, resume, small_digits)
    assert run(create_own, {}, resume, small_digits).top1 == summary.top1


def test_an_older_file_without_rule_and_number_of_edges_keeps_those_of_the_model(directory: Path, check: Check):
    checkpoint = read_checkpoint(directory / "last.ckpt")
    for name in ("num_edges", "rule"):
        del checkpoint["state_dict"][f"model.graph.{name}"]
    check(checkpoint)
    model = create_tiny(10, 8)
    model.load_state_dict(
        {
            name.removeprefix("model."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("model.")
        }
    )
    assert model.graph.num_edges == 40


def test_an_older_file_without_a_recording_will_do(directory: Path, check: Check):
    checkpoint = read_checkpoint(directory / "last.ckpt")
    del checkpoint["callbacks"]["WiringRecorder"]
    check(checkpoint)


def test_a_run_refuses_before_anything_is_written(directory: Path, small_digits: ImageData):
    checkpoint = read_checkpoint(directory / "last.ckpt")
    path = directory / "damaged.ckpt"
    before = (directory / "last.ckpt").read_bytes()
    for way in (MOMENTUM, "callbacks/WiringMonitor", "loops/fit_loop/epoch_progress/total"):
        changed = copy.deepcopy(checkpoint)
        container, key = at(changed, way)
        del container[key]
        WholeFileIO().save_checkpoint(changed, path)
        with pytest.raises(InputError, match="cannot be resumed from"):
            run(create_tiny, IDENTITY, options(directory, resume=str(path)), small_digits)
        assert (directory / "last.ckpt").read_bytes() == before


def test_an_evaluation_wants_the_weights_alone(directory: Path, small_digits: ImageData):
    checkpoint = read_checkpoint(directory / "last.ckpt")
    path = directory / "weights.ckpt"
    for part in ("callbacks", "optimizer_states", "lr_schedulers"):
        del checkpoint[part]
    WholeFileIO().save_checkpoint(checkpoint, path)
    run(create_tiny, IDENTITY, options(directory, output=None, evaluate=str(path)), small_digits)
    checkpoint["state_dict"]["model.graph.candidates.weight"][0] = torch.inf
    WholeFileIO().save_checkpoint(checkpoint, path)
    with pytest.raises(InputError, match=r"do not fit the model.*candidates\.weight has values that are NaN"):
        run(create_tiny, IDENTITY, options(directory, output=None, evaluate=str(path)), small_digits)


def test_weights_of_another_precision_will_do():
    state = {"a": torch.zeros(3), "b": torch.tensor(1)}
    check_weights("x.ckpt", {"a": torch.zeros(3).double(), "b": torch.tensor(1)}, state, "hint")
    for wrong in ({"a": torch.zeros(3)}, {**state, "c": torch.zeros(1)}, {**state, "b": torch.tensor(1.0)}, {}):
        with pytest.raises(InputError, match=r"^the weights in x\.ckpt do not fit the model: hint"):
            check_weights("x.ckpt", wrong, state, "hint")


@pytest.mark.parametrize(
    ("given", "like"),
    [
        (1, 2), (1, 2.0), (0.5, 2.0), ("a", "b"), (None, None), (True, False), ([1, 2], [3, 4]), ((1,), (2,)),
        ({"a": 1}, {"a": 2}), (3, int), (True, bool), (None, float | None), (1.5, float | None), ({}, dict),
    ],
)  # fmt: skip
def test_alike(given: Any, like: Any):
    match(given, like, "it")


@pytest.mark.parametrize(
    ("given", "like"),
    [
        (1.0, 2), (True, 2), (True, 2.0), (1, True), (1, "b"), (None, 1), (1, None), ([1], [3, 4]), ([1, 2], (1, 2)),
        ({"a": 1}, {"b": 2}), ({}, {"b": 2}), ({"a": 1, "b": 2}, {"a": 1}), ([1, "x"], [3, 4]), (True, int), (1, bool),
        (1, float | None), (math.nan, 1.0), (math.inf, float | None), ([], dict), ({"a": {"b": 1}}, {"a": {"b": "x"}}),
    ],
)  # fmt: skip
def test_not_alike(given: Any, like: Any):
    with pytest.raises(InputError, match=r"^it"):
        match(given, like, "it")
