"""Trains sparse models on two processes, half a batch each; started by test_ways_to_train.py."""

import sys
from pathlib import Path

import torch
from sparse_model import RULES, batches, make_model, train
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dnw_graph import InputError
from dnw_graph.sparse_layers import sparsify

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
store = torch.distributed.FileStore(str(folder / "store"), 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
own = [(x[rank::2], y[rank::2]) for x, y in batches()]
mesh = init_device_mesh("cpu", (2,))


def sparse_model(wiring):
    model = make_model()
    torch.manual_seed(rank)  # what a rule draws differs, as on machines that nobody has seeded alike
    sparsify(model, 0.3, wiring)
    return model


results = {}
for name, wiring in RULES.items():
    model = sparse_model(wiring)
    train(model, own, DistributedDataParallel(model))
    results[name] = model.state_dict()

model = sparse_model("dnw")
fully_shard(model, mesh=mesh)
train(model, own)
model.eval()(own[0][0])
model.unshard()
results["sharded"] = {name: value.detach().clone() for name, value in model.named_parameters()}

model.reshard()
scores = {"sharded": model(own[0][0])}
loaded = sparse_model("dnw")
fully_shard(loaded, mesh=mesh)
scores["untrained"] = loaded.eval()(own[0][0])
loaded.load_state_dict(model.state_dict())
scores["loaded"] = loaded(own[0][0])
checkpoint.save(get_model_state_dict(model), checkpoint_id=folder / "checkpoint")
restored = sparse_model("dnw")
fully_shard(restored, mesh=mesh)
state = get_model_state_dict(restored)
checkpoint.load(state, checkpoint_id=folder / "checkpoint")
set_model_state_dict(restored, state)
scores["restored"] = restored.eval()(own[0][0])
results["scores"] = {name: value.detach() for name, value in scores.items()}

model = sparse_model("dnw")
for part in (model.encoder, model):
    fully_shard(part, mesh=mesh)
try:
    model(own[0][0])
except InputError as error:
    results["sharded in parts"] = str(error)

torch.save(results, folder / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
