from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentError
from tiny import TinyModel
from torch import nn

from dnw_graph import InputError
from dnw_graph.training import ModelOptions, RunOptions, main, option
from dnw_graph.training.command_line import launched, one_line

DEFAULTS = RunOptions(image_size=8, batch_size=256, epochs=1, accelerator="cpu")


@dataclass(frozen=True)
class TinyOptions(ModelOptions):
    size: float = option(1.0, "a number that is there to be compared")
    quiet: bool = option(False, "a switch")

    def create(self, num_classes: int, image_size: int) -> nn.Module:
        if self.size <= 0:
            raise InputError(f"--size is {self.size}: expected a number above 0")
        return TinyModel(num_classes)


def start(*argv: str) -> int:
    return main("Train a tiny model.", TinyOptions, DEFAULTS, argv)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        start("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in (*RunOptions.__dataclass_fields__, *TinyOptions.__dataclass_fields__):
        assert f"--{name.replace('_', '-')}" in text
    assert "images per step, over all devices" in " ".join(text.split())


def test_options_come_from_defaults_then_file_then_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("dnw_graph.training.runs.run", lambda *args: seen.append(args))
    (tmp_path / "c.yaml").write_text("size: 2.5\nquiet: true\nbatch_size: 8\nlr: 0.3\nweight-decay: 1e-3\n")
    assert start("--config", "c.yaml", "--batch-size", "32", "--save-every=5") == 0
    create, model_options, options, *_ = seen[0]
    assert model_options == {"size": 2.5, "quiet": True}
    assert options == RunOptions(
        image_size=8, batch_size=32, epochs=1, accelerator="cpu", lr=0.3, weight_decay=1e-3, save_every=5
    )
    assert isinstance(create(10, 8), TinyModel)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "--epochs must be 1 or more; got 0"),
        (["--epochs", "many"], "--epochs: expected int, got many"),
        (["--batch-size", "2000"], "has 1437 training images, fewer than a batch of 2000"),
        (["--size", "0"], "--size is 0.0: expected"),
        (["--precision", "8"], "unknown precision '8'"),
        (["--data", "nowhere"], "data directory 'nowhere' does not exist"),
        (["--resume", "nothing.ckpt"], "'nothing.ckpt' is not a file"),
        (["--evaluate", "torn.ckpt"], "torn.ckpt cannot be read"),
        (["--config", "nothing.yaml"], "nothing.yaml"),
        (["--config", "unknown.yaml"], "unknown option --colour"),
        (["--config", "broken.yaml"], "Problems parsing config"),
        (["--config", "torn.ckpt"], "UnicodeDecodeError"),
        (["--output", "torn.ckpt/run"], "cannot write to directory torn.ckpt/run"),
        (["--config", "null.yaml"], "--data must be a string; got None"),
        (["--config", "loop.yaml"], "Unexpected config"),
        (["--config", "."], "--config is '.': expected a YAML file"),
        (["--config", "pipe"], "--config is 'pipe': expected a YAML file"),
        (["--lr", ".inf"], "--lr must be a finite number; got inf"),
        (["--lr", ".nan"], "--lr must be a finite number; got nan"),
        (["--output", "x" * 300], "File name too long"),
        (["--data", "a\0b"], r"--data must be a path; got 'a\x00b'"),
        (["--resume", "x" * 5000], "is not a file"),
        (["--image-size", "100000"], "of memory, and"),
        (["--colour", "red"], "--colour"),
        (["something"], "something"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], unchecked: None
):
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 torn \xff")
    (tmp_path / "null.yaml").write_text("data: null\n")
    (tmp_path / "loop.yaml").write_text("&a [*a]\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "unknown.yaml").write_text("colour: red\n")
    (tmp_path / "broken.yaml").write_text("epochs: [1\nlr: :\n")
    assert start(*argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert len(error) < 510
    assert error.startswith("error: ")
    assert message in error


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr("dnw_graph.training.runs.run", fail)
    with pytest.raises(ValueError, match="a defect"):
        start()


def test_messages_of_jsonargparse_are_one_line():
    error = ArgumentError(None, "Parser key \"batch_size\":\n  Expected a <class 'int'>. Got value: x")
    assert one_line(error) == "--batch-size: expected int, got x"


def test_a_run_is_quiet_but_for_its_summary(capsys: pytest.CaptureFixture[str]):
    assert start() == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line for line in out.replace("\x1b[A", "").splitlines() if line.strip()]
    assert re.fullmatch(
        r"epoch 1/1  loss \d\.\d{3}  top-1 \d+\.\d\d%  swapped \d+  live \d+\.\d%  [\d.]+ (s|min)", lines[0]
    )
    assert lines[1].startswith("top-1")
    assert lines[-1].startswith("written to runs/1: ")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {}),
        (
            {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"},
            {"devices": 4, "num_nodes": 2},
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "6", "SLURM_NNODES": "3"}, {"devices": 2, "num_nodes": 3}),
        ({"SLURM_NTASKS": "6", "SLURM_NNODES": "3"}, {}),  # the script of sbatch: one process
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "6", "SLURM_JOB_NAME": "bash"}, {}),
    ],
)
def test_processes_started_from_outside_are_counted(
    environ: dict[str, str], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected
    if expected:
        assert start("--devices", "16") == 2
        assert "--devices is 16, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.26, "0.3 s"), (59.9, "59.9 s"), (75.0, "1 min 15 s"), (7260.0, "2 h 1 min"), (90000.0, "1 d 1 h")],
)
def test_times_are_shown_in_two_units(seconds: float, text: str):
    from dnw_graph.training.console import duration

    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--learning-rate", "did you mean --lr? "),
        ("--batchsize=8", "did you mean --batch-size? "),
        ("--gpus", "did you mean --devices? "),
        ("--sizes", "did you mean --size? "),
        ("--colour", "--help"),
    ],
)
def test_options_that_come_near_are_named(given: str, meant: str, capsys: pytest.CaptureFixture[str]):
    assert start(given, *(["1"] if "=" not in given else [])) == 2
    assert f"error: unknown option {given.partition('=')[0]}: {meant}" in capsys.readouterr().err


def test_a_run_goes_on_with_the_options_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those that it holds, and of what is given what may differ."""
    from test_loading import write

    from dnw_graph.model_card import ModelCard
    from dnw_graph.preprocessing import Preprocessing

    seen = []
    monkeypatch.setattr("dnw_graph.training.runs.run", lambda *args: seen.append(args))
    card = ModelCard(Preprocessing(8, 8, (0.5,) * 3, (0.2,) * 3), ["a", "b"], None, {"size": 3.0, "lr": 0.7})
    machine = {"data": "/images", "workers": 3, "devices": 2}
    write(tmp_path / "last.ckpt", TinyModel(2), card=card.to_dict(), machine=machine)
    assert start("--resume", "last.ckpt", "--workers", "0") == 0
    assert start("--evaluate", "last.ckpt") == 0
    (_, resumed, go_on, *_), (_, _, evaluation, *_) = seen
    assert resumed == {"size": 3.0, "quiet": False}
    assert (go_on.lr, go_on.data, go_on.workers, go_on.devices) == (0.7, "/images", 0, 2)
    assert (evaluation.lr, evaluation.data, evaluation.workers, evaluation.devices) == (0.7, "/images", None, 1)


def test_a_configuration_is_written_when_a_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lightning.pytorch import Trainer

    def fail(*args: object, **named: object) -> None:
        raise InputError("before the first step")

    monkeypatch.setattr(Trainer, "fit", fail)
    options = ("--size", "2.5", "--lr", "0.3", "--workers", "0")
    assert start(*options, "--output", "run") == 2
    seen = []
    monkeypatch.setattr("dnw_graph.training.runs.run", lambda *args: seen.append(args))
    assert start("--config", "run/config.yaml", "--output", "run") == 0
    assert start(*options, "--output", "run") == 0
    assert seen[0][1:] == seen[1][1:]


def test_an_evaluation_needs_no_training_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image_directory: Path
):
    import shutil

    options = ("--data", str(image_directory), "--batch-size", "4", "--workers", "0")
    assert start(*options, "--output", "run") == 0
    trained = capsys.readouterr().out
    shutil.rmtree(image_directory / "train")
    shutil.rmtree(image_directory / "val" / "zero")  # nor all classes
    assert start("--evaluate", "run/last.ckpt", "--workers", "0") == 0
    assert "top-1" in trained
    assert "top-1" in capsys.readouterr().out


def test_a_run_starts_from_a_model_of_other_classes(tmp_path: Path, image_directory: Path):
    import torch

    from dnw_graph.training import read_checkpoint

    assert start("--data", str(image_directory), "--batch-size", "4", "--workers", "0", "--output", "a") == 0
    (image_directory / "train" / "one").rename(image_directory / "train" / "two")
    (image_directory / "val" / "one").rename(image_directory / "val" / "two")
    options = ("--data", str(image_directory), "--batch-size", "4", "--workers", "0", "--init-from", "a")
    assert start(*options, "--output", "b") == 0
    before = read_checkpoint("a/best.ckpt")["state_dict"]
    after = read_checkpoint("b/first.ckpt")["state_dict"]
    other = [name for name in before if not torch.equal(before[name], after[name])]
    assert other == ["model.classifier.weight", "model.classifier.bias"]
