from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny import TinyModel
from torch import nn

from dnw_graph import InputError
from dnw_graph.analysis.memory import free_memory
from dnw_graph.models import MobileNetV1DNW
from dnw_graph.training import RunOptions, hardware, trainer
from dnw_graph.training.hardware import check_step


class Convolution(nn.Module):
    """Keeps its input and 5 maps of its size for the backward pass, and 2 masks of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).sigmoid()


@pytest.mark.parametrize(("evaluate", "maps"), [(None, 3 + 5 + 2), ("last.ckpt", 5)])
def test_the_estimate_is_that_of_a_plain_count(evaluate, maps, monkeypatch):
    options = RunOptions(batch_size=8, evaluate=evaluate)
    needed = 8 * 300 * 300 * 4 * (3 + maps)  # the images themselves come on top
    monkeypatch.setattr(hardware, "free_memory", lambda: needed)
    check_step(Convolution(), 300, options, gpu=False)
    monkeypatch.setattr(hardware, "free_memory", lambda: needed - 2**20)
    with pytest.raises(InputError, match=r"--image-size 300 with --batch-size 8 needs at least .* GiB .* are free"):
        check_step(Convolution(), 300, options, gpu=False)


@pytest.mark.parametrize(("given", "own"), [({}, 0), ({"LOCAL_RANK": "1"}, 1), ({"SLURM_LOCALID": "2"}, 2)])
def test_the_memory_is_that_of_the_own_gpu(given, own, monkeypatch):
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=0: (2**40 if device == own else 0, 2**40))
    check_step(Convolution(), 300, RunOptions(batch_size=8, devices=4), gpu=True)


def test_a_run_is_on_the_cpu_where_there_is_no_cuda(monkeypatch):
    """Lightning would choose others too, such as MPS."""
    given, make = {}, trainer.Trainer
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(trainer, "Trainer", lambda **options: given.update(options) or make(**options))
    trainer.make_trainer(RunOptions())
    assert given["accelerator"] == "cpu"


def test_half_precision_takes_half(monkeypatch):
    needed = 8 * 300 * 300 * (3 * 4 + 10 * 2)
    monkeypatch.setattr(hardware, "free_memory", lambda: needed)
    check_step(Convolution(), 300, RunOptions(batch_size=8, precision="bf16-mixed"), gpu=False)
    with pytest.raises(InputError, match="needs at least"):
        check_step(Convolution(), 300, RunOptions(batch_size=8), gpu=False)


def test_a_trial_leaves_the_model_and_the_generator_alone(monkeypatch):
    monkeypatch.setattr(hardware, "free_memory", lambda: 10**9)
    model = TinyModel(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_step(model, 16, RunOptions(batch_size=64), gpu=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.stem._forward_hooks


def test_single_images_need_maps_of_more_than_one_pixel():
    model = MobileNetV1DNW(0.1, num_classes=2, stem_stride=1)
    check_step(model, 32, RunOptions(batch_size=1), gpu=False)
    check_step(model, 16, RunOptions(batch_size=2), gpu=False)
    check_step(model, 16, RunOptions(batch_size=1, evaluate="last.ckpt"), gpu=False)
    with pytest.raises(InputError, match="--batch-size 2 leaves one image at a time, too few for the norms"):
        check_step(model, 16, RunOptions(batch_size=2, devices=2), gpu=False)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="other systems tell less")
def test_free_memory_is_less_than_all_of_it():
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < free_memory() < int(total.split()[1]) * 1024 * 2
