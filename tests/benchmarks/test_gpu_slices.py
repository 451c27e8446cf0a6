"""``benchmarks/gpu.py``: slices that end in time and go on, and all of it on a CPU with tiny sizes."""

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def gpu():
    directory = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, directory)
    try:
        return __import__("gpu")
    finally:
        sys.path.remove(directory)


def program(gpu, tmp_path, name, code):
    result = tmp_path / f"{name}.json"
    return gpu.Task(name, ["-c", code.replace("RESULT", repr(str(result)))], result, tmp_path / f"{name}.log")


WRITES = (
    "import json; json.dump({'title': 'Steps', 'machine': {'device': 'a'}, 'rows': [{'ms': 2.5}]}, open(RESULT, 'w'))"
)
WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("saved")))
time.sleep(60)
"""


def test_what_is_done_is_not_done_again_and_what_takes_too_long_is_stopped(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LAST_WORDS", 2.0)
    every = [
        program(gpu, tmp_path, "good", WRITES),
        program(gpu, tmp_path, "bad", "raise SystemExit(3)"),
        program(gpu, tmp_path, "long", WAITS),
        program(gpu, tmp_path, "late", WRITES),
    ]
    monkeypatch.setattr(gpu, "tasks", lambda *_: iter(every))
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    start = time.monotonic()
    assert gpu.main(["--minutes", "0.15", "--output", str(tmp_path)]) == 1
    assert time.monotonic() - start < 30
    page = (tmp_path / "gpu.md").read_text()
    assert "- good: done" in page
    assert "- bad: failed" in page
    assert "- long: stopped" in page
    assert "| 2.5 |" in page
    assert "saved" in (tmp_path / "long.log").read_text()
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["good"]["result"]["rows"] == [{"ms": 2.5}]
    assert figures["late"]["state"] == "left"

    every[1:3] = []
    monkeypatch.setattr(gpu.Task, "run", lambda self, seconds: self.result.write_text("{}") and "done")
    assert gpu.main(["--minutes", "9", "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "good.json").read_text())["title"] == "Steps"
    assert "nothing is left" in capsys.readouterr().out


PARENT = """
import subprocess, sys, time
subprocess.run([sys.executable, "-c", "import time; open(r'RESULT', 'w').write('started'); time.sleep(60)"])
"""


def test_what_a_task_started_ends_with_it(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LAST_WORDS", 1.0)
    mark = tmp_path / "child"
    task = gpu.Task("parent", ["-c", PARENT.replace("RESULT", str(mark))], tmp_path / "none.json", tmp_path / "log")
    assert task.run(6.0) == "stopped"
    assert mark.exists()
    end = time.monotonic() + 10
    while commands_with(str(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not commands_with(str(mark))


def commands_with(word):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # A process that has just ended.
            found.append(path.read_bytes())
    return [command for command in found if word.encode() in command]


def test_sigterm_ends_the_task_too(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LAST_WORDS", 1.0)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    mark = tmp_path / "child"
    task = gpu.Task("parent", ["-c", PARENT.replace("RESULT", str(mark))], tmp_path / "none.json", tmp_path / "log")
    monkeypatch.setattr(gpu, "tasks", lambda *_: iter([task]))
    before = signal.signal(signal.SIGTERM, lambda *_: None)

    def stop():
        end = time.monotonic() + 60
        while not mark.exists() and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu.main(["--minutes", "9", "--output", str(tmp_path)])
        thread.join()
        assert mark.exists()
    finally:
        signal.signal(signal.SIGTERM, before)
    end = time.monotonic() + 10
    while commands_with(str(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not commands_with(str(mark))


def test_failed_tests_are_done_again(gpu, tmp_path):
    task = program(gpu, tmp_path, "tests", "open(RESULT, 'w').write('1 failed'); raise SystemExit(1)")
    assert task.run(60) == "failed"
    assert not task.done


def test_every_test_that_needs_a_gpu_is_run(gpu, tmp_path):
    tests = next(task for task in gpu.tasks(tmp_path, "/data", "cifar10-jpeg75", False) if task.name == "tests")
    found = {Path(word).name for word in tests.command if word.endswith(".py")}
    assert found == {"test_gpu.py", "test_static_graph.py", "test_sparse_product.py"}


def test_rows_without_a_record_of_these_images_are_left(gpu, tmp_path):
    rows = gpu.rows("table2", "cifar10")
    assert "cifar10_dnw" in rows
    assert rows.index("cifar10_complete") < rows.index("cifar10_lottery_ticket")
    assert "tiny_static_dnw" in gpu.rows("table1", "cifar10")
    assert "tiny_static_dnw" not in gpu.rows("table1", "cifar10-jpeg75")
    training = list(gpu.tasks(tmp_path, "/data", "cifar10-jpeg75", False))[-1].command
    assert training[training.index("--data-name") + 1] == "cifar10-jpeg75"


@pytest.mark.slow
def test_all_of_it_on_a_cpu_with_tiny_sizes(gpu, tmp_path, capsys):
    for _ in range(3):
        gpu.main(["--dry-run", "--minutes", "9", "--output", str(tmp_path)])
        if "nothing is left" in capsys.readouterr().out:
            break
    page = (tmp_path / "gpu.md").read_text()
    assert page.count(": done") == 4
    assert "reference formulation" in page
