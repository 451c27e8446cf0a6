"""A directory belongs to one run at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dnw_graph import InputError
from dnw_graph.stopping import MAIN_PROCESS
from dnw_graph.training import RunOptions
from dnw_graph.training.run_directory import run_directory

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks there")

HOLD = """
import sys, time
from dnw_graph.training import RunOptions
from dnw_graph.training.run_directory import run_directory
with run_directory(RunOptions(output=sys.argv[1] or None)) as directory:
    print(directory, flush=True)
    if sys.argv[2] == "fork":
        import os
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    sys.stdin.read()
"""


@contextmanager
def held(directory: Path | str, *, fork: bool = False, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses a directory."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLD, str(directory), "fork" if fork else ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=cwd,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_one_is_gone(tmp_path: Path, options: Callable[..., RunOptions]):
    chosen = options()
    # With a process that loads images, which outlives it for a while.
    with held(str(chosen.output), fork=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == chosen.output
        with pytest.raises(InputError) as error, run_directory(chosen):
            pass
        assert str(error.value) == (
            f"another run (process {other.pid}) uses {chosen.output}: wait for its end, or give another --output"
        )
        other.kill()
        other.wait()
        with run_directory(chosen) as directory:
            assert str(directory) == chosen.output


@pytest.mark.slow
def test_ranks_share_the_directory_of_their_run(
    tmp_path: Path, options: Callable[..., RunOptions], monkeypatch: pytest.MonkeyPatch
):
    with held(tmp_path / "runs" / "7") as main:
        assert main.stdout is not None
        directory = main.stdout.readline().strip()
        for name, value in {"LOCAL_RANK": "1", MAIN_PROCESS: str(main.pid), "DNW_GRAPH_DIRECTORY": directory}.items():
            monkeypatch.setenv(name, value)
        with run_directory(options(output=None)) as shared:
            assert str(shared) == directory


def test_another_run_of_the_same_ranks_has_its_own_output(
    options: Callable[..., RunOptions], monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"LOCAL_RANK": "1", "DNW_GRAPH_DIRECTORY": "first"}.items():
        monkeypatch.setenv(name, value)
    with run_directory(options(output="second")) as directory:
        assert directory == Path("second")


@pytest.mark.slow
def test_runs_that_start_at_the_same_time_get_directories_of_their_own(tmp_path: Path):
    with held("", cwd=tmp_path) as a, held("", cwd=tmp_path) as b, held("", cwd=tmp_path) as c:
        directories = {process.stdout.readline().strip() for process in (a, b, c) if process.stdout}
    assert directories == {"runs/1", "runs/2", "runs/3"}


def test_a_number_that_another_run_takes_first_is_passed_over(
    tmp_path: Path, options: Callable[..., RunOptions], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    make = Path.mkdir

    def slow(self: Path, *args: object, **named: object) -> None:
        if self == Path("runs/1") and not self.exists():
            make(self)  # by another run, just before
        make(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", slow)
    with run_directory(options(output=None)) as directory:
        assert directory == Path("runs/2")


@pytest.mark.parametrize("kind", ["a file", "a link to nothing"])
def test_runs_that_is_no_directory_is_refused(
    kind: str, tmp_path: Path, options: Callable[..., RunOptions], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    if kind == "a file":
        Path("runs").touch()
    else:
        Path("runs").symlink_to("nothing")
    with pytest.raises(InputError, match="cannot write to directory runs"), run_directory(options(output=None)):
        pass


def test_a_file_system_without_locks_is_used_without(
    options: Callable[..., RunOptions], monkeypatch: pytest.MonkeyPatch
):
    import errno
    import fcntl

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with run_directory(options()) as directory:
        assert directory.is_dir()
