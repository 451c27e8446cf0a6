from __future__ import annotations

import builtins
import errno
import io
import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dnw_graph import InputError
from dnw_graph.checkpoint import FORMAT, SECTION, read_checkpoint
from dnw_graph.checksum import checksum
from dnw_graph.training.checkpoints import WholeFileIO


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
    with pytest.raises(InputError, match="is not a checkpoint of this package"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save(Harm(), tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "harm").exists()


def test_no_bit_can_change_unseen(path: Path):
    content = path.read_bytes()
    expected = read_checkpoint(path)
    seen = 0
    for place in range(0, 8 * len(content), 401):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(path)
        except InputError:
            seen += 1
        else:  # between the records of the archive
            assert checksum(found) == checksum(expected)
    assert seen > 8 * 0.8 * len(content) / 401


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["state_dict"].update(weights=torch.full((1000,), 2)),
        lambda content: content["state_dict"].update(weights=torch.full((1, 1000), 1)),
        lambda content: content.pop("loops"),
        lambda content: content.update(more=3),
        lambda content: content[SECTION]["options"].update(lr=0.1),
        lambda content: content[SECTION].pop("checksum"),
        lambda content: content[SECTION].update(checksum=None),
    ],
)
def test_content_that_was_not_written_is_refused(path: Path, change: Callable[[Any], Any]):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(InputError, match="does not hold what was written"):
        read_checkpoint(path)


@pytest.mark.parametrize("part", ["state_dict", "global_step", "loops"])
def test_a_checkpoint_that_lacks_a_part_is_refused(path: Path, part: str):
    WholeFileIO().save_checkpoint({key: value for key, value in checkpoint(1).items() if key != part}, path)
    with pytest.raises(InputError, match=f"lacks a part .*{part}"):
        read_checkpoint(path)


def test_a_checkpoint_of_the_format_before_is_refused(path: Path):
    content = torch.load(path, weights_only=True)
    content[SECTION] = {"format": 1, "options": {}}
    torch.save(content, path)
    with pytest.raises(InputError, match=r"or has another version \(this one reads format 2\)"):
        read_checkpoint(path)


def test_shared_tensors_and_versions_of_modules_survive(tmp_path: Path):
    weight = torch.randn(4, 6)
    state = nn.BatchNorm1d(3).state_dict()
    state.update({"a": weight, "b": weight.t(), "c": weight[1:, ::2], "empty": weight[:0]})
    WholeFileIO().save_checkpoint({**checkpoint(1), "state_dict": state}, tmp_path / "x.ckpt")
    found = read_checkpoint(tmp_path / "x.ckpt")["state_dict"]
    assert found._metadata == state._metadata
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_what_is_read_does_not_depend_on_the_file(path: Path):
    found = read_checkpoint(path)
    path.write_bytes(b"")
    assert torch.equal(found["state_dict"]["weights"], torch.full((1000,), 1))


def archive(program: bytes, **options: Any) -> bytes:
    """An archive as ``torch.save`` writes it, with another program."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as file:
        for name, data in {"data.pkl": program, "byteorder": b"little", "version": b"3\n", "data/0": bytes(16)}.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def claiming(number: int) -> bytes:
    """A tensor of four numbers that claims to be larger."""
    buffer = io.BytesIO()
    torch.save({SECTION: {"format": FORMAT}, "x": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as file:
        program = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    said = b"\x8a\x08" + number.to_bytes(8, "little")
    assert program.count(b"K\x04tq") == program.count(b"K\x04\x85") == 1
    return archive(program.replace(b"K\x04tq", said + b"tq").replace(b"K\x04\x85", said + b"\x85"))


def lists(depth: int) -> bytes:
    content: list[Any] = []
    for _ in range(depth):
        content = [content, content]
    buffer = io.BytesIO()
    torch.save({SECTION: {"format": FORMAT}, "x": content}, buffer)
    return buffer.getvalue()


def expanded(numbers: int) -> bytes:
    buffer = io.BytesIO()
    torch.save({SECTION: {"format": FORMAT}, "x": torch.zeros(1).expand(numbers)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        claiming(10**12),
        claiming(5),
        expanded(10**12),
        lists(60),
        archive(b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R."),
        archive(b"\x80\x02ctorch\nTensor\nJ\0\0\0\x40\x85R."),
        archive(b"\x80\x02" + b"N0" * 10**6 + b"}.", compression=zipfile.ZIP_DEFLATED),
    ],
    ids=["huge tensor", "larger tensor", "expanded tensor", "lists", "bytearray", "tensor by name", "compressed"],
)
def test_a_file_that_claims_to_hold_more_than_it_does_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "x.ckpt").write_bytes(content)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limits[1]))
    try:
        with pytest.raises(InputError, match="damaged or not a checkpoint") as error:
            read_checkpoint(tmp_path / "x.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not isinstance(error.value.__cause__, MemoryError)


@pytest.mark.parametrize("name", ["missing.ckpt", "."])
def test_no_file_is_refused(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="is not a file"):
        read_checkpoint(tmp_path / name)
