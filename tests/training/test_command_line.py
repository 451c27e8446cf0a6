from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TinyModel
from jsonargparse import ArgumentError
from torch import nn

from dnw_graph import InputError
from dnw_graph.training import ModelOptions, RunOptions, main, option
from dnw_graph.training.command_line import one_line

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
    assert "images per step over all devices together" in " ".join(text.split())


def test_options_come_from_defaults_then_file_then_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("dnw_graph.training.command_line.run", lambda *args: seen.append(args))
    (tmp_path / "c.yaml").write_text("size: 2.5\nquiet: true\nbatch_size: 8\nlr: 0.3\nweight-decay: 1e-3\n")
    assert start("--config", "c.yaml", "--batch-size", "32", "--save-every=5") == 0
    create, model_options, options = seen[0]
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
        (["--batch-size", "2000"], "larger than the data set: expected at most its 1437"),
        (["--size", "0"], "--size is 0.0: expected"),
        (["--precision", "8"], "unknown precision '8'"),
        (["--data", "nowhere"], "data folder 'nowhere' does not exist"),
        (["--resume", "nothing.ckpt"], "'nothing.ckpt' is not a file"),
        (["--evaluate", "torn.ckpt"], "torn.ckpt cannot be read"),
        (["--config", "nothing.yaml"], "nothing.yaml"),
        (["--config", "unknown.yaml"], "'colour'"),
        (["--config", "broken.yaml"], "Problems parsing config"),
        (["--config", "torn.ckpt"], "UnicodeDecodeError"),
        (["--output", "torn.ckpt/run"], "cannot write to folder torn.ckpt/run"),
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

    monkeypatch.setattr("dnw_graph.training.command_line.run", fail)
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
    rest = [line for line in lines if "it/s" not in line and "?it" not in line]
    assert rest[0].startswith("top-1")
    assert rest[-1].startswith("written to runs/1: ")
