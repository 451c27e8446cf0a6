"""Building the kernels: by the first call, whoever comes first; whatever goes wrong, PyTorch does the work."""

import ctypes
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import dnw_graph
from dnw_graph.ops import build, sparse_product

# Prints what was loaded after the import, and whether the first product is right.
PROGRAM = """
import torch
from dnw_graph.ops import build, sparse_product
print(build._load.cache_info().currsize)
product = sparse_product(torch.ones(3, 20), torch.tensor([0, 2]), torch.tensor([0, 2]), torch.tensor([1.0, 2.0]))
print(product.eq(3).all().item(), build.kernels() is not None)
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and kernels that nobody has asked for yet."""
    monkeypatch.delenv("DNW_GRAPH_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._load.cache_clear()
    yield tmp_path / "dnw_graph"
    build._load.cache_clear()


@pytest.fixture
def source(monkeypatch, tmp_path, has_compiler):
    """A source of one function, which takes no time to compile."""
    file = tmp_path / "sources" / "kernels.cpp"
    file.parent.mkdir()
    file.write_text('extern "C" int answer() { return 1; }')
    monkeypatch.setattr(build, "SOURCES", file.parent)
    monkeypatch.setattr(build, "SYMBOLS", ("answer",))
    return file


def multiply():
    z = torch.arange(40.0).view(2, 20)
    return sparse_product(z, torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([2.0, 1.0]))


def start(program=PROGRAM, **environment):
    command = [sys.executable, "-W", "ignore", "-c", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    root = Path(dnw_graph.__file__).parents[1]
    return subprocess.Popen(command, cwd=root, env={**os.environ, **environment}, **pipes)


def the_library(cache):
    (library,) = cache.iterdir()
    return library


def answer():
    build._load.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return build.kernels().answer()


@pytest.mark.slow
def test_importing_builds_nothing_and_two_processes_may_build_at_once(cache, has_compiler):
    for process in [start(), start()]:
        assert process.communicate(timeout=300) == ("0\nTrue True\n", "")
    assert {path.suffix for path in cache.iterdir()} == {".so"}


@pytest.mark.slow
def test_an_ascii_locale_is_enough(cache, has_compiler):
    process = start(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert process.communicate(timeout=300) == ("0\nTrue True\n", "")


def test_what_was_built_is_found_again_unless_the_source_has_changed(cache, source, monkeypatch):
    assert answer() == 1
    kept = the_library(cache)
    monkeypatch.setattr(build.subprocess, "run", counted := Counted(subprocess.run))
    assert answer() == 1
    assert counted.calls == 1  # The compiler's macros alone.
    source.write_text('extern "C" int answer() { return 2; }')
    assert answer() == 2
    assert kept in cache.iterdir()
    assert len(list(cache.iterdir())) == 2


def test_further_flags_make_another_library(cache, source, monkeypatch):
    source.write_text('extern "C" int answer() { return NUMBER; }')
    for number in (3, 4):
        monkeypatch.setenv("DNW_GRAPH_CXXFLAGS", f"-DNUMBER={number}")
        assert answer() == number


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def truncate(library):
    with open(library, "r+b") as file:
        file.truncate(5_000)


def flip(library):
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def empty(library):
    library.write_bytes(b"")


def planted_link(library):
    elsewhere = library.parents[1] / "elsewhere.so"
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


def planted_second_name(library):
    (library.parents[1] / "elsewhere.so").hardlink_to(library)


def a_pipe(library):
    library.unlink()
    os.mkfifo(library)


def writable_by_others(library):
    library.chmod(0o666)


def of_somebody_else(library):
    os.chown(library, 12345, 12345)


def named_for_another_content(library):
    library.rename(library.with_name("-".join([*library.stem.split("-")[:2], "0" * 16]) + ".so"))


DAMAGE = [truncate, flip, empty, planted_link, planted_second_name, a_pipe, writable_by_others, of_somebody_else]


@pytest.mark.parametrize("damage", [*DAMAGE, named_for_another_content])
def test_a_damaged_or_planted_library_is_never_loaded_but_replaced(cache, source, damage, monkeypatch):
    if damage is of_somebody_else and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    loaded = []

    class Library(ctypes.CDLL):
        """Not mapped into this process, whose files must not be truncated."""

        answer = 1

        def __init__(self, path):
            loaded.append(Path(path).read_bytes())

    monkeypatch.setattr(ctypes, "CDLL", Library)
    for prepare in (None, damage):
        if prepare is not None:
            prepare(the_library(cache))
        build._load.cache_clear()
        assert build.kernels().answer == 1
    assert loaded[0] == loaded[1] == the_library(cache).read_bytes()
    status = the_library(cache).lstat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_uid == os.geteuid()


def test_the_folder_is_the_users_alone(cache, source):
    umask = os.umask(0)
    try:
        assert answer() == 1
    finally:
        os.umask(umask)
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)  # As an older version may have left it.
    assert answer() == 1
    assert cache.stat().st_mode & 0o777 == 0o700


def foreign_folder(cache):
    cache.mkdir()
    os.chown(cache, 12345, 12345)


def linked_folder(cache):
    cache.parent.joinpath("elsewhere").mkdir()
    cache.symlink_to(cache.parent / "elsewhere")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (foreign_folder, "others can write"),
        (linked_folder, "Not a directory|Too many levels"),
        (Path.touch, "Not a directory"),
    ],
)
def test_a_folder_that_others_may_have_made_is_not_used(cache, source, prepare, reason):
    if prepare is foreign_folder and os.geteuid() != 0:
        pytest.skip("only root can give folders away")
    prepare(cache)
    before = cache.stat()
    with pytest.warns(UserWarning, match=reason):
        assert build.kernels() is None
    assert cache.stat() == before


def test_no_home(cache, source, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    with pytest.warns(UserWarning, match="set XDG_CACHE_HOME"):
        assert build.kernels() is None


def test_a_relative_cache_home_is_ignored_as_the_specification_says(cache, source, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert answer() == 1
    assert (tmp_path / "home/.cache/dnw_graph").is_dir()
    assert not (tmp_path / "relative").exists()


@pytest.mark.slow
def test_what_a_killed_build_left_is_removed_but_not_what_others_work_in(cache, source, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) ;; *) touch {tmp_path}/started; exec sleep 60;; esac\n')
    compiler.chmod(0o755)
    build_slowly = f"from pathlib import Path\n{PROGRAM}".replace("product = ", "build.SYMBOLS = ()\nproduct = ")
    process = start(build_slowly, CXX=str(compiler))
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    (folder,) = cache.iterdir()
    assert answer() == 1
    assert folder.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert answer() == 1
    assert not folder.exists()


def script(tmp_path, text):
    path = tmp_path / "compiler"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


COMPILERS = {
    "fails": ("false", "false failed"),
    "is not there": ("/no/such/compiler --option", "No such file"),
    "is no command": ("g++ 'unfinished", "No closing quotation"),
    "is empty": (" ", "-std"),
    "makes nothing": ("true", "No such file"),
    "prints what is no text": ("#!/bin/sh\nprintf '\\377\\376 error \\200\\n' >&2\nexit 3\n", "failed: .* error"),
    "makes what is no library": (
        "#!/bin/sh\nwhile [ $# -gt 1 ]; do [ $1 = -o ] && echo nonsense > $2; shift; done\n",
        "invalid ELF header|file too short|not valid|slice",
    ),
}


@pytest.mark.parametrize(("compiler", "reason"), [*COMPILERS.values(), (None, "no C.. compiler found")])
def test_without_a_compiler_one_warning_and_the_same_result(cache, monkeypatch, tmp_path, compiler, reason):
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(cache))
    else:
        monkeypatch.setenv("CXX", script(tmp_path, compiler) if compiler.startswith("#!") else compiler)
    with pytest.warns(UserWarning, match=f"could not be built.*{reason}.*DNW_GRAPH_KERNELS=0") as warned:
        received = multiply()
    (message,) = [str(w.message) for w in warned if "could not be built" in str(w.message)]
    assert len(message) < 500
    assert "\n" not in message
    assert received.tolist() == [[float(3 * f + 20) for f in range(20)]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multiply()
    assert not cache.exists() or not [path for path in cache.iterdir() if path.is_dir()]


def test_a_source_that_does_not_compile_is_reported_with_the_compilers_first_error(cache, source):
    source.write_text("int main() { return nonsense; }")
    with pytest.warns(UserWarning, match="nonsense"):
        assert build.kernels() is None
    assert list(cache.iterdir()) == []


def test_a_library_that_lacks_a_function_is_not_used(cache, source, monkeypatch):
    monkeypatch.setattr(build, "SYMBOLS", ("answer", "question"))
    with pytest.warns(UserWarning, match="lacks question"):
        assert build.kernels() is None


def test_a_folder_without_room_is_reported(cache, source, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert build.kernels() is None
    assert list(cache.iterdir()) == []


def test_the_kernels_can_be_switched_off(cache, monkeypatch):
    monkeypatch.setenv("DNW_GRAPH_KERNELS", "0")
    assert build.kernels() is None
    multiply()
    assert not cache.exists()
