"""Lottery Ticket and Fine Tune from the directory of a finished run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyModel
from torch import Tensor, nn

from dnw_graph import InputError
from dnw_graph.checkpoint import FORMAT, SECTION
from dnw_graph.checksum import checksum
from dnw_graph.recipes.models import MobileNetOptions, ResNetOptions, TinyOptions
from dnw_graph.recipes.second_stage import second_stage
from dnw_graph.training import ImageData, RunOptions, WiringOptions, read_checkpoint, run
from dnw_graph.wirings import Wiring, create_wiring

K = 40
COMPLETE = {"wiring": "complete"}
SHARED = {"image_size": 8}


def tiny(wiring: str | Wiring = "complete", k: int = K) -> TinyModel:
    model = TinyModel(10)
    model.graph.rewire(wiring, k)
    return model


class StoppedError(Exception):
    pass


def stopping(model: nn.Module, step: int) -> nn.Module:
    """Have a model fail in a step of training."""
    steps = iter(range(100))

    def stop(*args: Any) -> None:
        if model.training and next(steps) == step:
            raise StoppedError

    model.register_forward_pre_hook(stop)
    return model


def run_options(directory: Path, **changes: Any) -> RunOptions:
    values = {"image_size": 8, "batch_size": 16, "epochs": 2, "lr": 0.3, "accelerator": "cpu", "workers": 0}
    return RunOptions(**{**values, "output": str(directory), **changes})


@pytest.fixture(scope="module")
def first_stage(small_digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a finished run of a complete graph."""
    directory = tmp_path_factory.mktemp("complete") / "run"
    run(lambda *_: tiny(), COMPLETE, run_options(directory), small_digits)
    return directory


def model_state(path: Path) -> dict[str, Tensor]:
    state = read_checkpoint(path)["state_dict"]
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def assert_starts_from(model: nn.Module, path: Path) -> None:
    """All parameters and buffers are those of a checkpoint; only the edges are new."""
    state, expected = model.state_dict(), model_state(path)
    assert state.keys() - expected.keys() == {"graph.wiring.index", "graph.wiring.checksum"}
    assert expected.keys() <= state.keys()
    of_the_rule = {"graph.num_edges", "graph.rule"}
    assert all(torch.equal(value, state[key]) for key, value in expected.items() if key not in of_the_rule)


def strongest(weight: Tensor, k: int = K) -> list[int]:
    return sorted(np.argsort(-weight.abs().numpy(), kind="stable")[:k].tolist())


def test_first_and_last_checkpoint_are_the_ends_of_the_run(first_stage: Path, small_digits: ImageData):
    assert read_checkpoint(first_stage / "first.ckpt")["global_step"] == 0
    torch.manual_seed(run_options(first_stage).seed)
    initial = tiny().state_dict()
    first, last = model_state(first_stage / "first.ckpt"), model_state(first_stage / "last.ckpt")
    assert initial.keys() == first.keys() == last.keys()
    assert all(torch.equal(value, first[key]) for key, value in initial.items())
    assert not torch.equal(first["graph.candidates.weight"], last["graph.candidates.weight"])


@pytest.mark.parametrize(("rule", "start"), [("lottery_ticket", "first.ckpt"), ("fine_tune", "last.ckpt")])
@pytest.mark.parametrize("k", [7, K])
def test_edges_of_the_end_and_weights_of_the_rule(rule: str, start: str, k: int, first_stage: Path):
    model = second_stage(rule, first_stage, tiny(k=k), SHARED)
    assert isinstance(model, TinyModel)
    trained = model_state(first_stage / "last.ckpt")["graph.candidates.weight"]
    assert model.graph.real_index.tolist() == strongest(trained, k)
    assert_starts_from(model, first_stage / start)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "start"), [("lottery_ticket", "first.ckpt"), ("fine_tune", "last.ckpt")])
def test_stopped_and_resumed_without_the_first_stage(
    rule: str, start: str, first_stage: Path, small_digits: ImageData, tmp_path: Path
):
    def create(*_: int) -> nn.Module:
        return second_stage(rule, first_stage, tiny(), SHARED)

    unbroken = run(create, {}, run_options(tmp_path / "unbroken"), small_digits)
    edges = model_state(tmp_path / "unbroken" / "first.ckpt")["graph.wiring.index"].tolist()
    trained = model_state(first_stage / "last.ckpt")["graph.candidates.weight"]
    assert edges == strongest(trained)
    chosen = run_options(tmp_path / "run", save_every=1)
    with pytest.raises(StoppedError):
        run(lambda *_: stopping(create(), 5), {}, chosen, small_digits)
    # The first stage is not needed any more, and the directory may be gone.
    last = str(tmp_path / "run" / "last.ckpt")
    resumed = run(lambda *_: tiny(create_wiring(rule)), {}, replace(chosen, resume=last), small_digits)
    assert replace(resumed, seconds=None) == replace(unbroken, seconds=None)
    one, other = (model_state(tmp_path / name / "last.ckpt") for name in ("run", "unbroken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    evaluated = run(lambda *_: tiny(create_wiring(rule)), {}, replace(chosen, output=None, evaluate=last), small_digits)
    assert (evaluated.top1, evaluated.parameters) == (unbroken.top1, unbroken.parameters)


def test_without_a_first_stage_it_is_refused_before_training(small_digits: ImageData, tmp_path: Path):
    with pytest.raises(InputError, match="tiny: FineTune needs a trained complete graph"):
        run(lambda *_: tiny("fine_tune"), {}, run_options(tmp_path / "run"), small_digits)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("rule", ["dnw", "complete", "random_graph"])
def test_rules_without_a_second_stage_are_refused(rule: str, first_stage: Path):
    with pytest.raises(
        InputError, match="--complete goes with --wiring lottery_ticket or fine_tune: give one of these rules"
    ):
        second_stage(rule, first_stage, tiny(), SHARED)


@pytest.mark.slow
def test_an_unfinished_run_is_refused_until_it_is_finished(small_digits: ImageData, tmp_path: Path):
    directory = tmp_path / "run"
    chosen = run_options(directory, save_every=1)
    with pytest.raises(StoppedError):
        run(lambda *_: stopping(tiny(), 6), COMPLETE, chosen, small_digits)
    with pytest.raises(InputError, match=r"last.ckpt is at epoch 1 of 2: finish the run first, with --resume"):
        second_stage("fine_tune", directory, tiny(), SHARED)
    run(lambda *_: tiny(), COMPLETE, replace(chosen, resume=str(directory / "last.ckpt")), small_digits)
    assert_starts_from(second_stage("lottery_ticket", directory, tiny(), SHARED), directory / "first.ckpt")


def test_a_run_stopped_before_its_last_evaluation_is_unfinished(small_digits: ImageData, tmp_path: Path):
    def fail_in_evaluation(model: nn.Module) -> nn.Module:
        def stop(*args: Any) -> None:
            if not model.training:
                raise StoppedError

        model.register_forward_pre_hook(stop)
        return model

    with pytest.raises(StoppedError):
        run(lambda *_: fail_in_evaluation(tiny()), COMPLETE, run_options(tmp_path, epochs=1), small_digits)
    with pytest.raises(InputError, match="is at epoch 0 of 1: finish the run first"):
        second_stage("fine_tune", tmp_path, tiny(), SHARED)


def test_a_run_with_another_wiring_is_refused(small_digits: ImageData, tmp_path: Path):
    run(lambda *_: tiny("dnw"), {"wiring": "dnw"}, run_options(tmp_path / "run", epochs=1), small_digits)
    message = "--complete needs a run with --wiring 'complete', but .*last.ckpt was trained with 'dnw'"
    with pytest.raises(InputError, match=message) as error:
        second_stage("fine_tune", tmp_path / "run", tiny(), SHARED)
    assert "\n" not in str(error.value)


def test_images_of_another_size_are_refused(first_stage: Path):
    with pytest.raises(InputError, match=r"needs a run with --image-size 16, but .* was trained with 8"):
        second_stage("fine_tune", first_stage, tiny(), {"image_size": 16})


FAMILIES = {
    "mobilenet": (MobileNetOptions(width=0.05), [{"width": 0.1}, {"small": True}, {"node_norm_eps": 1e-5}]),
    "resnet": (ResNetOptions(), [{"model": "resnet34"}, {"first_layer_dense": True}]),
    "tiny": (
        TinyOptions(),
        [{"dynamics": "discrete"}, {"node_function": "relu_conv_send_norm"}, {"node_norm_eps": 1e-5}],
    ),
}


def written(options: WiringOptions, directory: Path, without: str = "") -> str:
    """A directory with the options of a finished complete run, except one, and without weights."""
    held = {**replace(options, wiring="complete").identity(), "image_size": 16, "epochs": 1}
    held.pop(without, None)
    loops = {"fit_loop": {"epoch_progress": {"current": {"completed": 1}}}}
    section = {"options": held, "format": FORMAT}
    checkpoint = {"state_dict": {}, "global_step": 1, "loops": loops, SECTION: section}
    section["checksum"] = checksum(checkpoint)
    torch.save(checkpoint, directory / "last.ckpt")
    return str(directory)


@pytest.mark.parametrize(
    ("family", "change"), [(name, change) for name, (_, changes) in FAMILIES.items() for change in changes], ids=str
)
def test_a_model_that_computes_another_function_is_refused(family: str, change: dict[str, Any], tmp_path: Path):
    options = FAMILIES[family][0]
    other = replace(options, wiring="fine_tune", complete=written(options, tmp_path), **change)
    ((name, value),) = change.items()
    expected = f"--complete needs a run with --{name.replace('_', '-')} {value!r}, but {tmp_path / 'last.ckpt'} was"
    with pytest.raises(InputError) as error:
        other.create(10, 16)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (ResNetOptions(), {"density": 0.3, "distribution": "erdos_renyi"}),
        (TinyOptions(dynamics="continuous"), {"adjoint": True}),
        (MobileNetOptions(width=0.05), {"node_norm_eps": 1e-3}),  # the default
    ],
    ids=str,
)
def test_stages_may_differ_where_the_function_is_the_same(
    options: WiringOptions, change: dict[str, Any], tmp_path: Path
):
    other = replace(options, wiring="fine_tune", complete=written(options, tmp_path), **change)
    with pytest.raises(InputError, match="do not fit the model"):  # The file has no weights.
        other.create(10, 16)


def test_files_from_before_the_eps_was_an_option_have_that_of_then(tmp_path: Path):
    directory = written(TinyOptions(), tmp_path, without="node_norm_eps")
    for eps, message in (
        (1e-5, "do not fit the model"),
        (1e-3, "--node-norm-eps 0.001, but .* was trained with 1e-05"),
    ):
        with pytest.raises(InputError, match=message):
            TinyOptions(wiring="fine_tune", complete=directory, node_norm_eps=eps).create(10, 16)


@pytest.mark.parametrize("change", [lambda directory: directory / "gone", lambda directory: directory.parent])
def test_a_directory_without_a_run_is_refused(change: Callable[[Path], Path], first_stage: Path):
    with pytest.raises(InputError, match=r"last.ckpt' is not a file: give a .ckpt file"):
        second_stage("fine_tune", change(first_stage), tiny(), SHARED)


@pytest.mark.parametrize("rule", ["lottery_ticket", "fine_tune"])
def test_another_model_is_refused(rule: str, first_stage: Path):
    for other in (nn.Linear(3, 10), TinyModel(11)):
        with pytest.raises(InputError, match="do not fit the model: give a run of this model") as error:
            second_stage(rule, first_stage, other, SHARED)
        assert "\n" not in str(error.value)


def test_a_lottery_ticket_needs_the_start_of_the_run(first_stage: Path, tmp_path: Path):
    directory = tmp_path / "copied"
    directory.mkdir()
    shutil.copy(first_stage / "last.ckpt", directory)
    with pytest.raises(InputError, match=r"first.ckpt' is not a file"):
        second_stage("lottery_ticket", directory, tiny(), SHARED)
    assert_starts_from(second_stage("fine_tune", directory, tiny(), SHARED), first_stage / "last.ckpt")


@pytest.mark.slow
def test_a_first_stage_that_was_resumed_keeps_its_start(small_digits: ImageData, tmp_path: Path):
    chosen = run_options(tmp_path / "run", save_every=1)
    with pytest.raises(StoppedError):
        run(lambda *_: stopping(tiny(), 3), COMPLETE, chosen, small_digits)
    before = (tmp_path / "run" / "first.ckpt").read_bytes()
    run(lambda *_: tiny(), COMPLETE, replace(chosen, resume=str(tmp_path / "run" / "last.ckpt")), small_digits)
    assert (tmp_path / "run" / "first.ckpt").read_bytes() == before
