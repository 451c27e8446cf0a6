"""Files survive whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dnw_graph import InputError
from dnw_graph.whole_file import make_writable, write_whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "file.bin"
    write_whole(file, b"before", "--output")
    return file


def failing(number: int):
    def fail(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_content_is_on_the_disk_before_it_has_the_name_and_the_name_before_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        assert Path(source).read_bytes() == b"after"
        assert path.read_bytes() == b"before"
        calls.append("replace")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_whole(path, memoryview(b"after"), "--output")
    assert calls == [f"{path}.partial", "replace", str(path.parent)]
    assert path.read_bytes() == b"after"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "make room, or give another --output"), (errno.EROFS, "give another --output")],
)
def test_a_failing_write_leaves_the_file_and_nothing_else(
    call: str, number: int, advice: str, path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(InputError) as error:
        write_whole(path, b"after", "--output")
    assert str(error.value) == f"cannot write {path} ({os.strerror(number)}): {advice}"
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


def test_a_clean_up_that_fails_does_not_hide_the_error(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "replace", failing(errno.EROFS))
    monkeypatch.setattr(Path, "unlink", failing(errno.EROFS))
    with pytest.raises(InputError, match=r"cannot write .*file.bin \(Read-only file system\)"):
        write_whole(path, b"after", "--output")


def test_folders_that_cannot_be_flushed_are_no_error(path: Path, monkeypatch: pytest.MonkeyPatch):
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(path, b"after", "--output")
    assert path.read_bytes() == b"after"


def test_a_folder_that_has_become_a_file(path: Path):
    path.unlink()
    path.parent.rmdir()
    path.parent.touch()
    with pytest.raises(InputError, match=r"\(Not a directory\): give another --export"):
        write_whole(path, b"after", "--export")
    with pytest.raises(
        InputError, match=r"cannot write to directory .* \((File exists|Not a directory)\): give another"
    ):
        make_writable(path.parent, "--export")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that has been mounted read-only, which binds root too."""
    folder = tmp_path / "mount"
    folder.mkdir()
    for arguments in (["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
        if subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode:
            subprocess.run(["umount", str(folder)], capture_output=True, check=False)
            pytest.skip("cannot mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_mount_that_is_read_only(read_only: Path):
    with pytest.raises(InputError, match=r"\(Read-only file system\): give another path"):
        write_whole(read_only / "file", b"", "path")
    with pytest.raises(InputError, match=r"\(Read-only file system\): give another one with --output"):
        make_writable(read_only, "--output")


@pytest.mark.parametrize("name", ["", ".", "a\0b"])
def test_what_cannot_be_the_name_of_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cannot write .*: give another path"):
        write_whole(Path(name), b"content", "path")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_the_name_of_a_folder():
    with pytest.raises(InputError, match=r"cannot write to directory .*null byte.*: give another one with --output"):
        make_writable(Path("a\0b"), "--output")


def test_a_link_stays_and_its_target_is_written(path: Path, tmp_path: Path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "there" / "link"
    link.symlink_to(path)
    write_whole(link, b"after", "--output")
    assert link.is_symlink()
    assert path.read_bytes() == b"after"
    path.unlink()
    write_whole(link, b"again", "--output")
    assert path.read_bytes() == b"again"
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["file.bin", "link", "there"]


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_file_keeps_its_mode(mode: int, path: Path):
    path.chmod(mode)
    write_whole(path, b"after", "--output")
    assert path.stat().st_mode & 0o777 == mode
    assert path.read_bytes() == b"after"


def test_runs_that_start_at_once_can_all_write(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(make_writable, tmp_path / "runs", "--output") for _ in range(400)]:
            each.result()
    assert not list((tmp_path / "runs").iterdir())
