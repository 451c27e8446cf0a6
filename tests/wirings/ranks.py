"""Trains every rule on two processes, half a batch each, and alone; started by test_ranks.py."""

import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dnw_graph import (
    ACDC,
    GMP,
    NM,
    SET,
    STR,
    NeuralGraph,
    RigL,
    SparseMomentum,
    TargetedDropout,
    TopKAST,
    attach,
    wiring_penalty,
)
from dnw_graph.ranking import rankings
from dnw_graph.sparse_layers import sparsify

STEPS = 200
RULES = {
    "set": SET(0.3, 20),
    "rigl": RigL(0.3, 20),
    "sparse_momentum": SparseMomentum(every=20),
    "gmp": GMP(0.1, 0.7, 20),
    "top_kast": TopKAST(0.2, 1e-3),
    "ac_dc": ACDC((0.2, 0.4, 0.6, 0.8, 0.9)),
    "str": STR(-4.0, 1e-3),
    "nm": NM(),
    "targeted_dropout": TargetedDropout(0.5),
}


def make(rule):
    graph = NeuralGraph((6, 8, 5), 40, node_function=nn.Tanh(), input_function=False)
    model = nn.Sequential(graph, nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    graph.take(graph.prepare(rule, None if isinstance(rule, NM) else 40))
    sparsify(model, None if isinstance(rule, NM) else 0.4, rule, skip=NeuralGraph)
    return model


def train(model, call, rank):
    """The edges of every step; ``rank`` is None for the joined batch."""
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    attach(call, optimiser, STEPS)
    seen = []
    for number in range(STEPS):
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        target = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x.sum(1) / 3], dim=1)
        if rank is not None:
            x, target = x[rank::2], target[rank::2]
        optimiser.zero_grad()
        (nn.functional.mse_loss(call(x), target) + wiring_penalty(model)).backward()
        optimiser.step()
        seen.append([graph.real_index.tolist() for _, graph in rankings(model)])
    return seen


folder, rank = Path(sys.argv[1]), int(sys.argv[2])
store = torch.distributed.FileStore(str(folder / "store"), 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
results, starts = {}, {}
for name, rule in RULES.items():
    torch.manual_seed(10 + rank)  # as on machines that nobody has seeded alike
    model = make(rule)
    wrapped = DistributedDataParallel(model)
    starts[name] = copy.deepcopy(model)
    results[name] = train(model, wrapped, rank), model.state_dict()
torch.distributed.destroy_process_group()
if rank == 0:
    torch.manual_seed(10)
    results["alone"] = {}
    for name, model in starts.items():
        results["alone"][name] = train(model, model, None), model.state_dict()
torch.save(results, folder / f"rank{rank}.pt")
