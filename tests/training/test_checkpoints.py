"""A resumed run gives the same numbers as an unbroken one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import every_value, rest_is_slow
from torch import Tensor, nn

from dnw_graph import InputError
from dnw_graph.data.sources import ImageData
from dnw_graph.recipes.options import RunOptions
from dnw_graph.training import Checkpoints, Stopped, Summary, read_checkpoint, run
from dnw_graph.training.checkpoints import WholeFileIO, loop_state
from dnw_graph.training.classifier import Classifier

Create = Callable[[int, int], nn.Module]
STEPS, EPOCHS = 4, 3


class CrashError(Exception):
    pass


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of every training step, as they happen."""
    seen: list[float] = []
    step = Classifier.training_step

    def record(self: Classifier, batch: Any, batch_idx: int) -> Tensor:
        loss = step(self, batch, batch_idx)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(Classifier, "training_step", record)
    return seen


def crash_at(create: Create, training: bool, call: int, action: Callable[[], None]) -> Create:
    """Make the model act in its so-many-th forward pass of training, or of evaluation."""

    def wrapped(num_classes: int, image_size: int) -> nn.Module:
        model = create(num_classes, image_size)
        calls = 0

        def hook(module: nn.Module, args: object) -> None:
            nonlocal calls
            if module.training is training:
                if calls == call:
                    action()
                calls += 1

        model.register_forward_pre_hook(hook)
        return model

    return wrapped


def crash() -> None:
    raise CrashError


def without_time(summary: Summary) -> Summary:
    return replace(summary, seconds=None)


def assert_equal_states(a: Path, b: Path) -> None:
    one, other = read_checkpoint(a), read_checkpoint(b)
    assert one["global_step"] == other["global_step"] == STEPS * EPOCHS
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for key, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][key]), key
    momenta = [[state["momentum_buffer"] for state in c["optimizer_states"][0]["state"].values()] for c in (one, other)]
    assert all(torch.equal(x, y) for x, y in zip(*momenta, strict=True))
    assert one["lr_schedulers"] == other["lr_schedulers"]


def assert_goes_on(create: Create, images: ImageData, chosen: RunOptions, summary: Summary, unbroken: Path) -> None:
    """A run that is resumed ends as an unbroken one did: summary, state and table."""
    last = Path(chosen.output or "") / "last.ckpt"
    resumed = run(create, {}, replace(chosen, resume=str(last)), images)
    assert without_time(resumed) == without_time(summary)
    assert_equal_states(last, unbroken / "last.ckpt")
    assert (last.parent / "metrics.csv").read_text() == (unbroken / "metrics.csv").read_text()


# What stops the run: (training pass?, number of the pass), the step of the checkpoint that is left, and whether the run
# is killed, so that it saves nothing on its way out. Evaluation takes 2 forward passes per epoch.
PLACES = {
    "mid-epoch": ({"save_every": 3}, True, 7, 6, False),
    "last batch of an epoch": ({}, False, 3, 8, False),
    "last batch of an epoch, killed": ({"save_every": STEPS}, False, 2, 8, True),
    "between epochs": ({}, True, 8, 8, False),
    "in the first epoch": ({"save_every": 1}, True, 1, 1, False),
}


@pytest.mark.parametrize(("place", "workers"), rest_is_slow(product(PLACES, [0, 2])))
def test_resume_is_exact(
    place: str,
    workers: int,
    create: Create,
    small_digits: ImageData,
    options: Callable[..., RunOptions],
    losses: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unbroken = run(create, {}, options(output=str(tmp_path / "unbroken")), small_digits)
    expected = losses.copy()
    assert len(expected) == STEPS * EPOCHS
    assert unbroken.graphs["tiny"].edges_swapped
    changes, training, call, saved, killed = PLACES[place]
    chosen = options(workers=workers, **changes)
    if killed:
        monkeypatch.setattr(Checkpoints, "on_exception", lambda *args: None)
    losses.clear()
    with pytest.raises(CrashError):
        run(crash_at(create, training, call, crash), {}, chosen, small_digits)
    last = Path(chosen.output or "") / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == saved
    assert losses[:saved] == expected[:saved]
    losses.clear()
    assert_goes_on(create, small_digits, chosen, unbroken, tmp_path / "unbroken")
    assert losses == expected[saved:]


@pytest.mark.slow
def test_resume_twice_in_a_row_while_evaluating(
    create: Create, small_digits: ImageData, options: Callable[..., RunOptions], losses: list[float], tmp_path: Path
) -> None:
    unbroken = run(create, {}, options(output=str(tmp_path / "unbroken")), small_digits)
    expected = losses.copy()
    chosen = options()
    last = str(Path(chosen.output or "") / "last.ckpt")
    losses.clear()
    for resume, call in ((None, 3), (last, 0), (last, 1)):
        with pytest.raises(CrashError):
            run(crash_at(create, False, call, crash), {}, replace(chosen, resume=resume), small_digits)
    resumed = run(create, {}, replace(chosen, resume=last), small_digits)
    assert losses == expected
    assert without_time(resumed) == without_time(unbroken)


# Where the weights are spoilt: (training pass?, number of the pass, options, step of the checkpoint that stays).
SPOILT = {
    "before an evaluation": (False, 2, {}, STEPS),
    "before a checkpoint within an epoch": (True, 5, {"save_every": 1}, STEPS + 1),
}


@every_value(rest=pytest.mark.slow, place=SPOILT, part=["graph.candidates.weight", "classifier.bias"])
def test_weights_that_are_not_finite_never_replace_a_checkpoint(
    place: str, part: str, create: Create, small_digits: ImageData, options: Callable[..., RunOptions]
) -> None:
    training, call, changes, saved = SPOILT[place]
    chosen = options(**changes)
    models: list[nn.Module] = []

    def kept(num_classes: int, image_size: int) -> nn.Module:
        models.append(create(num_classes, image_size))
        return models[-1]

    def spoil() -> None:
        models[-1].get_parameter(part).data[1] = torch.nan

    with pytest.raises(InputError, match=r"NaN or infinite"):
        run(crash_at(kept, training, call, spoil), {}, chosen, small_digits)
    state = read_checkpoint(f"{chosen.output}/last.ckpt")
    assert state["global_step"] == saved
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_resume_of_a_finished_run_reports_it_again(
    create: Create, small_digits: ImageData, options: Callable[..., RunOptions], losses: list[float]
) -> None:
    chosen = options(epochs=1)
    first = run(create, {}, chosen, small_digits)
    losses.clear()
    again = run(create, {}, replace(chosen, resume=f"{chosen.output}/last.ckpt"), small_digits)
    assert losses == []
    assert without_time(again) == without_time(first)


@every_value(rest=pytest.mark.slow, number=[signal.SIGINT, signal.SIGTERM], workers=[0, 2])
def test_a_stopped_run_keeps_its_last_step(
    number: signal.Signals,
    workers: int,
    create: Create,
    small_digits: ImageData,
    options: Callable[..., RunOptions],
    losses: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop_all() -> None:
        for process in multiprocessing.active_children():  # a terminal, too, signals the whole group
            os.kill(process.pid or 0, number)
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    chosen = options(workers=workers)
    with pytest.raises(Stopped) as stopped:
        run(crash_at(create, True, 5, stop_all), {}, chosen, small_digits)
    assert stopped.value.code == 128 + number
    assert len(losses) == 6  # the step in progress was finished
    assert read_checkpoint(f"{chosen.output}/last.ckpt")["global_step"] == 6
    last = f"{chosen.output}/last.ckpt"
    assert capsys.readouterr().err == f"stopped after step 6: continue with --resume {last}\n"
    assert signal.getsignal(number) == before


@pytest.mark.slow
@pytest.mark.parametrize("evaluate", [False, True])
def test_the_loss_of_a_worker_is_told_in_one_line(
    evaluate: bool, create: Create, small_digits: ImageData, options: Callable[..., RunOptions]
) -> None:
    def lose_worker() -> None:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        time.sleep(1)

    chosen = options(workers=1, save_every=1)
    if evaluate:
        run(create, {}, options(), small_digits)
        chosen = options(workers=1, evaluate=f"{options().output}/last.ckpt", output=None)
    with pytest.raises(InputError, match=r"^a data-loading process was killed.*: give fewer --workers") as error:
        run(crash_at(create, not evaluate, 0 if evaluate else 1, lose_worker), {}, chosen, small_digits)
    if not evaluate:
        last = f"{chosen.output}/last.ckpt"
        assert str(error.value).endswith(f"continue with --resume {last}")
        assert read_checkpoint(last)["global_step"] == 1


def test_gpus_are_waited_for_at_every_fifth_step_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    class Run:
        world_size = 2
        is_global_zero = False
        global_step = 0

        class strategy:  # noqa: N801
            root_device = torch.device("cuda")

        def save_checkpoint(self, path: Path) -> None:
            saved.append((self.global_step, path.name))

    def stops_after(told_at: int, save_every: int) -> int:
        """The step after which a rank stops if any is told to at a step."""
        trainer, checkpoints = Run(), Checkpoints(tmp_path, save_every, {})
        monkeypatch.setattr(Checkpoints, "_told", lambda self, trainer: 15 * (trainer.global_step >= told_at))
        with suppress(Stopped):
            for trainer.global_step in range(100):
                due = bool(save_every) and trainer.global_step % save_every == 0
                checkpoints._save_last(trainer, due)
        assert saved[-1] == (trainer.global_step, "last.ckpt")
        return trainer.global_step

    saved: list[tuple[int, str]] = []
    assert [stops_after(step, 0) for step in range(7)] == [0, 5, 5, 5, 5, 5, 10]
    assert [stops_after(step, 3) for step in range(7)] == [0, 3, 3, 3, 5, 5, 6]


# Where a signal comes, as for PLACES, and the step of the checkpoint that is left.
MOMENTS = {
    "first checkpoint": (None, 0),
    "first step": ((True, 0), 1),
    "last step of an epoch": ((True, 3), 4),
    "evaluation": ((False, 2), 8),
    "last evaluation": ((False, 5), 12),
}


@pytest.mark.parametrize("moment", rest_is_slow(MOMENTS))
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_numbers(
    moment: str,
    create: Create,
    small_digits: ImageData,
    options: Callable[..., RunOptions],
    losses: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unbroken = run(create, {}, options(output=str(tmp_path / "unbroken")), small_digits)
    expected = losses.copy()
    place, saved = MOMENTS[moment]
    chosen = options()
    last = Path(f"{chosen.output}/last.ckpt")

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    losses.clear()
    with monkeypatch.context() as patch:
        if place is None:
            save = WholeFileIO.save_checkpoint
            patch.setattr(WholeFileIO, "save_checkpoint", lambda *args, **named: (stop(), save(*args, **named)))
        with pytest.raises(Stopped):
            run(create if place is None else crash_at(create, *place, stop), {}, chosen, small_digits)
    assert read_checkpoint(last)["global_step"] == saved
    assert_goes_on(create, small_digits, chosen, unbroken, tmp_path / "unbroken")
    assert losses == expected


def test_a_failing_write_does_not_hide_what_failed_first(
    create: Create,
    small_digits: ImageData,
    options: Callable[..., RunOptions],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        monkeypatch.setattr(os, "replace", full)
        raise CrashError

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    chosen = options()
    with pytest.raises(CrashError):
        run(crash_at(create, False, 0, fail), {}, chosen, small_digits)
    assert "the last complete step is lost: cannot write" in capsys.readouterr().err


@pytest.mark.slow
def test_best_is_the_epoch_of_highest_top1(
    create: Create, small_digits: ImageData, options: Callable[..., RunOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options()
    summary = run(create, {}, chosen, small_digits)
    best = read_checkpoint(f"{chosen.output}/best.ckpt")
    assert best["global_step"] == STEPS * (summary.best_epoch or 0)
    evaluated = run(create, {}, options(evaluate=f"{chosen.output}/best.ckpt", output=None), small_digits)
    assert evaluated.top1 == summary.best_top1


@pytest.mark.parametrize("steps", range(13))
@pytest.mark.parametrize("epoch_complete", [False, True])
def test_loop_state_counts(steps: int, epoch_complete: bool) -> None:
    if steps == 0 and not epoch_complete:
        pytest.skip("an epoch without steps is never evaluated")
    state = loop_state(steps, 4, epoch_complete)
    epoch = state["epoch_progress"]["current"]
    evaluated = steps // 4 - (steps % 4 == 0 and not epoch_complete)
    assert epoch["completed"] == epoch["processed"] == evaluated
    assert epoch["ready"] == epoch["started"] == -(-steps // 4)
    batches = state["epoch_loop.batch_progress"]
    assert batches["total"]["completed"] == steps
    assert 4 * evaluated + batches["current"]["completed"] == steps


@pytest.fixture(autouse=True)
def _quiet() -> None:
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
