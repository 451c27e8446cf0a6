"""Trains two models on two processes; each leaves what it has in a file. Started by test_distributed.py."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny import TinyModel, first_digits
from torch import Tensor, nn

from dnw_graph.training import RunOptions, run

models: list[nn.Module] = []
evaluated: list[dict[str, Tensor]] = []


def note(model: nn.Module, images: object) -> None:
    """Keep the buffers with which a model is evaluated."""
    if not model.training:
        evaluated.append({name: buffer.clone() for name, buffer in model.named_buffers()})


def create(num_classes: int, image_size: int) -> TinyModel:
    models.append(TinyModel(num_classes))
    if accumulate > 1:  # which is compared with one process, of other random numbers
        models[-1].dropout.p = 0.0
    models[-1].register_forward_pre_hook(note)
    return models[-1]


def create_other(num_classes: int, image_size: int) -> nn.Module:
    layers = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, num_classes)
    models.append(nn.Sequential(*layers))
    models[-1].register_forward_pre_hook(note)
    return models[-1]


directory, accumulate = Path(sys.argv[1]), int(sys.argv[2])
options = RunOptions(
    image_size=8,
    batch_size=16,
    epochs=2,
    lr=1.0,
    accelerator="cpu",
    devices=2,
    accumulate=accumulate,
    workers=0,
    output=str(directory / "run"),
)
summary = run(create, {}, options, first_digits())
model = models[0]
state = {"real_index": model.graph.real_index, "state_dict": model.state_dict(), "top1": summary.top1}
os.chdir(directory)
run(create_other, {}, replace(options, held_out=20, ema=0.5, output=None), first_digits())
state |= {"other": models[1].state_dict(), "evaluated": evaluated}
torch.save(state, directory / f"rank{torch.distributed.get_rank()}.pt")
