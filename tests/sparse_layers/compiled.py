"""Trains sparse models compiled and not, and leaves both in a file; started by test_ways_to_train.py.

A process of its own: the compiler cannot look through the type checks that the other tests run under.
"""

import copy
import sys

import torch
from sparse_model import batches, make_model, train

from dnw_graph import TargetedDropout
from dnw_graph.sparse_layers import sparsify, weight_graphs

CASES = {
    "dnw": ("dnw", "uniform"),
    "counts its steps": (TargetedDropout(0.5), "global"),
}
results = {}


def refusal(model, x, strict):
    """What an export says of a model that has been compiled."""
    try:
        torch.export.export(model, (x,), strict=strict)
    except Exception as error:
        return str(error)
    return "exported"


for name, (wiring, distribution) in CASES.items():
    model = make_model()
    sparsify(model, 0.3, wiring, distribution=distribution)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(model, batches(3), compiled)
    train(twin, batches(3))
    pairs = list(zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    x = batches(1)[0][0]
    for _ in range(2):
        pairs.append((compiled.eval()(x).detach(), twin.eval()(x).detach()))
        for each in (model, twin):
            with torch.no_grad():
                each.encoder.layers[0].mlp[0].parametrizations.weight.original.reciprocal_()
    steps = [int(getattr(graph.wiring, "step", 0)) for graph in weight_graphs(model).values()]
    refusals = [refusal(model, x, strict) for strict in (False, True)]
    results[name] = {"pairs": pairs, "steps": steps, "refusals": refusals}
torch.save(results, sys.argv[1])
