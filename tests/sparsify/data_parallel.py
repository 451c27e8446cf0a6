"""Trains a sparse model on two processes, half a batch each; started by test_ways_to_train.py."""

import sys
from pathlib import Path

import torch
from sparse_model import batches, make_model, train
from torch.nn.parallel import DistributedDataParallel

from dnw_graph.sparsify import sparsify

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
store = torch.distributed.FileStore(str(folder / "store"), 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
states = {}
for wiring in ("dnw", "random_graph"):
    model = make_model()
    sparsify(model, 0.3, wiring)
    train(model, [(x[rank::2], y[rank::2]) for x, y in batches()], DistributedDataParallel(model))
    states[wiring] = model.state_dict()
torch.save(states, folder / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
