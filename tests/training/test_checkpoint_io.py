from __future__ import annotations

import builtins
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dnw_graph import InputError
from dnw_graph.training.checkpoint_io import FORMAT, SECTION, WholeFileIO, read_checkpoint


def checkpoint(value: int) -> dict[str, Any]:
    return {
        SECTION: {"format": FORMAT, "options": {}},
        "global_step": value,
        "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": 0}}}},
        "state_dict": {"weights": torch.full((1000,), value)},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "last.ckpt"
    WholeFileIO().save_checkpoint(checkpoint(1), file)
    return file


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let half of what is written reach the file, then report a full disk."""
    real = builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        handle = real(file, mode, *args, **kwargs)
        if "w" in mode:
            write = handle.write

            class Full:
                def __enter__(self) -> Full:
                    return self

                def __exit__(self, *args: object) -> None:
                    handle.close()

                def write(self, data: Any) -> None:
                    write(data[: len(data) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return Full()
        return handle

    monkeypatch.setattr(builtins, "open", opened)


def test_round_trip(path: Path):
    assert torch.equal(read_checkpoint(path)["state_dict"]["weights"], torch.full((1000,), 1))
    WholeFileIO().save_checkpoint(checkpoint(2), path)
    assert torch.equal(WholeFileIO().load_checkpoint(path)["state_dict"]["weights"], torch.full((1000,), 2))
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_full_disk_leaves_the_previous_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        fill_disk(patch)
        with pytest.raises(InputError, match=f"cannot write {path} \\(No space left on device\\)"):
            WholeFileIO().save_checkpoint(checkpoint(2), path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["weights"], torch.full((1000,), 1))
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_process_leaves_the_previous_checkpoint(path: Path, moment: str):
    """A child process dies within the write, without any clean-up."""
    child = os.fork()
    if child == 0:
        setattr(os, moment, lambda *args: os._exit(9))
        WholeFileIO().save_checkpoint(checkpoint(2), path)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert torch.equal(read_checkpoint(path)["state_dict"]["weights"], torch.full((1000,), 1))
    assert not [p for p in path.parent.glob("*.ckpt") if p != path]
    WholeFileIO().save_checkpoint(checkpoint(3), path)
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.999])
def test_torn_file_is_refused(path: Path, share: float):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="damaged or not a checkpoint") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {SECTION: {"format": FORMAT + 1}}, {SECTION: 3}])
def test_foreign_checkpoint_is_refused(tmp_path: Path, content: Any):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="is no checkpoint of this package"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save(Harm(), tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["missing.ckpt", "."])
def test_no_file_is_refused(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="is not a file"):
        read_checkpoint(tmp_path / name)
