"""metrics.csv survives kills, and a resumed run continues it."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dnw_graph import InputError
from dnw_graph.training.loggers import Events, Table, Wandb


def rows(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def written(tmp_path: Path) -> Table:
    """Three rows: a step, an evaluation, another step."""
    table = Table(tmp_path, 0)
    table.log_metrics({"train/loss": 2.5, "epoch": 0}, 3)
    table.log_metrics({"val/top1": 0.5, "epoch": 0}, 3)
    table.log_metrics({"train/loss": 1.25, "epoch": 1}, 7)
    return table


def test_rows_and_columns(written: Table, tmp_path: Path):
    text = (tmp_path / "metrics.csv").read_text()
    assert text.splitlines() == ["epoch,step,train/loss,val/top1", "0,3,2.5,", "0,3,,0.5", "1,7,1.25,"]
    assert written.rows == 3


def test_a_row_is_on_the_disk_when_the_call_returns(written: Table, monkeypatch: pytest.MonkeyPatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    written.log_metrics({"train/loss": 1.0, "epoch": 2}, 11)
    assert synced == [written.path.stat().st_size]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9, None])
@pytest.mark.parametrize("torn", ["", "1,", '2,9,"1.', "\0\0\0\0"])
@pytest.mark.parametrize("new", [{}, {"new": 7.0}], ids=["same columns", "a new column"])
def test_a_resumed_run_keeps_the_rows_of_its_checkpoint(
    count: int | None, torn: str, new: dict[str, float], written: Table, tmp_path: Path
):
    if torn and (count is None or count > 3):
        pytest.skip("no checkpoint counts a row that is torn")
    before = rows(tmp_path)
    with open(written.path, "a") as file:
        file.write(torn)
    resumed = Table(tmp_path, count)
    kept = 3 if count is None else min(count, 3)
    assert resumed.rows == kept
    if kept:
        assert rows(tmp_path) == before[:kept]
    else:
        assert not written.path.exists()
    resumed.log_metrics({"train/loss": 0.5, "epoch": 1, **new}, 7)
    last = rows(tmp_path)[-1]
    assert len(rows(tmp_path)) == kept + 1
    assert {name: value for name, value in last.items() if value} == {
        "train/loss": "0.5",
        "epoch": "1",
        "step": "7",
        **{name: str(value) for name, value in new.items()},
    }


@pytest.mark.parametrize("new", [False, True], ids=["resuming", "a new column"])
def test_a_kill_while_the_file_is_written_anew_loses_nothing(new: bool, written: Table, tmp_path: Path):
    before = rows(tmp_path)
    child = os.fork()
    if child == 0:
        os.replace = lambda *args: os._exit(9)  # type: ignore[assignment]
        if new:
            written.log_metrics({"new": 1.0}, 8)
        else:
            Table(tmp_path, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert rows(tmp_path) == before


def test_other_ranks_write_nothing(tmp_path: Path, written: Table, monkeypatch: pytest.MonkeyPatch):
    before = written.path.read_bytes()
    monkeypatch.setenv("LOCAL_RANK", "1")
    Table(tmp_path, 0).log_metrics({"train/loss": 0.0}, 1)
    assert written.path.read_bytes() == before


@pytest.mark.parametrize("content", [b"epoch,step\n\xff\xfe\n", b"epoch,step\n1,2\n" + b"x" * 200_000])
def test_a_file_that_is_no_table_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"metrics.csv cannot be read \(.*\): move it away") as error:
        Table(tmp_path, 3)
    assert "\n" not in str(error.value)


def test_a_directory_that_is_gone(written: Table, tmp_path: Path):
    written.path.unlink()
    tmp_path.rmdir()
    with pytest.raises(InputError, match=r"cannot write .*metrics.csv \(No such file or directory\): give another"):
        written.log_metrics({"train/loss": 0.0, "epoch": 1}, 8)


def test_a_run_in_weights_and_biases_ends_with_its_training(monkeypatch: pytest.MonkeyPatch):
    ended: list[int] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda exit_code: ended.append(exit_code)))
    for status, begins_run in (("failed", True), ("success", True), ("success", False)):
        logger = Wandb.__new__(Wandb)
        logger._experiment, logger._begins_run = None, begins_run
        logger.finalize(status)
    assert ended == [1, 0]


def test_events_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "tensorboard").touch()
    events = Events(tmp_path, 0)
    with pytest.raises(InputError, match=r"cannot write .*tensorboard.* give another --output"):
        events.log_metrics({"train/loss": 1.0}, 0)
    events.finalize("failed")
