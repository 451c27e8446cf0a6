"""Runs that torchrun or SLURM has started, and a comparison: as users start them, in processes of their own."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import dnw_graph
from dnw_graph.training import read_checkpoint

pytestmark = pytest.mark.slow

COMMAND = ("-m", "dnw_graph.cli")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")  # on a free port
OPTIONS = (
    *("--width", "0.1", "--image-size", "8", "--batch-size", "512", "--epochs", "1"),
    *("--workers", "0", "--accelerator", "cpu"),
)

STEPS_PER_EPOCH = 2  # 1,294 digits in batches of 512


Start = Callable[..., subprocess.Popen[str]]


@contextmanager
def processes() -> Iterator[Start]:
    """Start programs; none of their processes is left at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(directory: Path, *words: str, **environ: str) -> subprocess.Popen[str]:
        root = str(Path(dnw_graph.__file__).parents[1])
        names = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=directory,
            env={**names, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def start() -> Iterator[Start]:
    with processes() as start:
        yield start


def summary_of(directory: Path) -> dict[str, object]:
    """The summary of the only run, without its time."""
    assert [path.name for path in (directory / "runs").iterdir()] == ["1"]
    return {**json.loads((directory / "runs" / "1" / "summary.json").read_text()), "seconds": None}


@pytest.fixture(scope="module")
def by_lightning(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The summary of a run that starts its second process itself."""
    directory = tmp_path_factory.mktemp("lightning")
    with processes() as start:
        process = start(directory, *COMMAND, "train", *OPTIONS, "--devices", "2")
        _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return summary_of(directory)


def test_torchrun_starts_one_run(start: Start, tmp_path: Path, by_lightning: dict[str, object]):
    process = start(tmp_path, *TORCHRUN, *COMMAND, "train", *OPTIONS)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert out.count("written to runs/1: ") == 1
    assert summary_of(tmp_path) == by_lightning


def test_ctrl_c_under_torchrun_leaves_a_run_that_goes_on(start: Start, tmp_path: Path):
    process = start(tmp_path, *TORCHRUN, *COMMAND, "train", *OPTIONS, "--epochs", "4")
    assert process.stdout is not None
    assert next(line for line in process.stdout if line.startswith("epoch 1/4"))
    os.killpg(process.pid, signal.SIGINT)  # to all of the group, as from a terminal
    _, err = process.communicate(timeout=100)
    with pytest.raises(ProcessLookupError):  # neither rank is left
        os.killpg(process.pid, 0)
    (stopped,) = re.findall(r"^stopped after step (\d+): continue with (.+)$", err, re.MULTILINE)
    last = tmp_path / "runs" / "1" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == int(stopped[0])
    again = start(tmp_path, *shlex.split(stopped[1])[1:])
    out, err = again.communicate(timeout=500)
    assert again.returncode == 0, err
    assert "epoch 4/4" in out
    assert read_checkpoint(last)["global_step"] == 4 * STEPS_PER_EPOCH


def test_slurm_starts_one_run(start: Start, tmp_path: Path, by_lightning: dict[str, object]):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    environ = {
        "MASTER_PORT": port,  # By default, the end of the job's number.
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NAME": "train",
        "SLURM_STEP_ID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "127.0.0.1",
    }
    words = (*COMMAND, "train", *OPTIONS)
    ranks = [start(tmp_path, *words, **environ, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in "01"]
    outputs = [rank.communicate(timeout=500) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [out.count("written to") for out, _ in outputs] == [1, 0]
    assert summary_of(tmp_path) == by_lightning


def test_rules_are_compared(start: Start, tmp_path: Path):
    words = ("compare", "--rules", "dnw", "random_graph", "--seeds", "0", "1", *OPTIONS)
    process = start(tmp_path, *COMMAND, *words)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    rows = list(csv.DictReader((tmp_path / "runs/compare/compare.csv").read_text().splitlines()))
    assert [(row["rule"], row["seed"]) for row in rows] == [
        (rule, seed) for rule in ("dnw", "random_graph") for seed in "01"
    ]
    for row in rows:
        own = json.loads((tmp_path / "runs/compare" / row["rule"] / f"seed{row['seed']}" / "summary.json").read_text())
        assert float(row["top1"]) == own["top1"]
        assert own["options"]["wiring"] == row["rule"]
    assert "| random_graph | 2 | " in out
    assert (tmp_path / "runs/compare/compare.png").stat().st_size > 1000
