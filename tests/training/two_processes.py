"""Trains the tiny model on two processes; each leaves what it has in a file. Started by test_distributed.py."""

import sys
from pathlib import Path

import torch
from conftest import TinyModel, first_digits

from dnw_graph.training import RunOptions, run

models = []


def create(num_classes: int, image_size: int) -> TinyModel:
    models.append(TinyModel(num_classes))
    if accumulate > 1:  # which is compared with one process, of other random numbers
        models[-1].dropout.p = 0.0
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
rank = torch.distributed.get_rank()
state = {"real_index": model.graph.real_index, "state_dict": model.state_dict(), "top1": summary.top1}
torch.save({**state, "loss_steps": options.epochs * 4}, directory / f"rank{rank}.pt")
