from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from torch.utils.data import Dataset

import dnw_graph.data.workers as workers
from dnw_graph import InputError
from dnw_graph.data.workers import Loader, leave_the_group
from dnw_graph.stopping import SIGNALS
from dnw_graph.training import DataModule, ImageData, RunOptions, load_images


def test_defaults_follow_the_data(small_digits: ImageData):
    data = DataModule(small_digits, RunOptions(batch_size=16))
    assert (data.image_size, data.workers, data.steps_per_epoch) == (16, 0, 4)


def test_directory_defaults(image_directory):
    data = DataModule(load_images(str(image_directory)), RunOptions(batch_size=4))
    assert data.image_size == 224
    assert data.workers >= 1


def test_batch_larger_than_the_data_is_refused(small_digits: ImageData, options: Callable[..., RunOptions]):
    assert DataModule(small_digits, options(batch_size=70)).steps_per_epoch == 1
    with pytest.raises(InputError, match="70 training images, fewer than a batch of 71"):
        DataModule(small_digits, options(batch_size=71))


def test_fewer_test_images_than_devices_are_refused(small_digits: ImageData, options: Callable[..., RunOptions]):
    with pytest.raises(InputError, match="30 test images cannot be split over 31 devices"):
        DataModule(small_digits, options(devices=31, batch_size=62))


def test_an_evaluation_takes_no_more_memory_than_a_part_of_a_batch(
    small_digits: ImageData, options: Callable[..., RunOptions]
):
    for processes in (1, 2):
        data = DataModule(small_digits, options(batch_size=16, accumulate=4, devices=processes))
        data.trainer = Mock(global_rank=0, world_size=processes)
        assert max(len(labels) for _, labels in data.val_dataloader()) <= 16 // 4 // processes


class Pids(Dataset[int]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_workers_get_no_signals_of_the_group_and_end_when_their_parent_says_so():
    loader = Loader(Pids(), batch_size=1, num_workers=2)
    batches = iter(loader)
    workers = {int(next(batches)) for _ in range(20)}
    assert len(workers) == 2
    assert all(os.getpgid(worker) == worker for worker in workers)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    child = next(child for child in multiprocessing.active_children() if child.pid == min(workers))
    os.kill(min(workers), signal.SIGINT)
    assert len({int(next(batches)) for _ in range(20)}) == 2
    child.terminate()
    child.join(30)
    assert child.exitcode == 0


def test_signals_of_a_worker_do_not_reach_the_watching_thread_of_its_parent():
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno())
    try:
        child = os.fork()
        if child == 0:
            leave_the_group(0)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        assert os.waitpid(child, 0)[1] == 0
        writer.send(b"\0")
        assert signal.SIGTERM not in reader.recv(100)
    finally:
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()


@pytest.mark.parametrize(("hangs", "together", "waits"), [(True, True, 1), (True, False, 0), (False, True, 0)])
def test_threads_of_a_process_group_settle_before_workers_are_forked(
    hangs: bool, together: bool, waits: int, monkeypatch: pytest.MonkeyPatch
):
    slept: list[float] = []
    monkeypatch.setattr(workers, "FORKS_CAN_HANG", hangs)
    monkeypatch.setattr(workers.time, "sleep", slept.append)
    if together:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert len(list(Loader(Pids(), batch_size=500, num_workers=1))) == 2
    finally:
        if together:
            dist.destroy_process_group()
    assert slept.count(workers.SETTLING_SECONDS) == waits


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_a_worker_has_left_the_group_is_dropped(number: signal.Signals):
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        os.kill(os.getpid(), number)
        leave_the_group(0)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(("error", "told"), [(ConnectionResetError(), False), (EOFError(), False), (KeyError(), True)])
def test_a_worker_prints_no_traceback_where_its_parent_is_gone(
    error: Exception, told: bool, capfd: pytest.CaptureFixture[str]
):
    child = os.fork()
    if child == 0:
        leave_the_group(0)
        sys.excepthook(type(error), error, None)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (type(error).__name__ in capfd.readouterr().err) == told
