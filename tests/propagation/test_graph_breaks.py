"""Compiled models with graph breaks, in a process of its own: the compiler cannot look through type checks."""

import pytest
from alone import run_alone

PROGRAM = """
import copy

import torch
from torch import nn

from dnw_graph import Continuous, InputError, NeuralGraph

SIZES, NODES = (6, 8, 4), {"num_nodes": 8, "num_inputs": 6, "num_outputs": 2}


def models():
    yield nn.Sequential(nn.Conv2d(6, 6, 3), NeuralGraph(num_edges=20, dynamics=Continuous("rk4"), **NODES))
    yield NeuralGraph(SIZES, 20, propagation="message_passing")
    yield nn.Sequential(nn.Conv2d(6, 6, 3), NeuralGraph(SIZES, 20), nn.ReLU(inplace=True))


torch.manual_seed(0)
values = torch.randn(20, 6, 5, 5)
for model in models():
    torch.compiler.reset()
    results = []
    for each in (torch.compile(copy.deepcopy(model), backend="eager"), model):
        x = values.clone().requires_grad_()
        out = each(x)
        out.square().mean().backward()
        results.append([out, x.grad, *(p.grad for p in each.parameters())])
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair)
    print("same")
try:
    torch.compile(NeuralGraph(SIZES, 20, propagation="sparse"), backend="eager")(values)
except InputError as error:
    print(error)
"""


@pytest.mark.slow
def test_compiled_gradients_are_those_of_eager():
    run = run_alone(PROGRAM)
    assert run.stdout.startswith("same\n" * 3 + "propagation='sparse' calls kernels that cannot be traced"), run.stderr


IN_EVALUATION = """
import torch

from dnw_graph import InputError, NeuralGraph

torch.manual_seed(0)
values = torch.randn(20, 6, 5, 5)
for rule, whole in (("random_graph", True), ("set", False)):
    graph = NeuralGraph((6, 8, 4), 20, wiring=rule).eval()
    expected = graph(values)
    torch.testing.assert_close(torch.compile(graph, backend="eager", fullgraph=whole)(values), expected)
    try:
        torch.testing.assert_close(torch.export.export(graph, (values,)).module()(values), expected)
        print("exported")
    except InputError as error:
        print(error)
"""


@pytest.mark.slow
def test_graphs_that_store_their_edges_are_compiled_and_exported_or_refused_in_one_line():
    run = run_alone(IN_EVALUATION)
    refused = "graph: the edges of SET change in number, so it cannot be exported: compact(…) the model first"
    assert run.stdout.splitlines() == ["exported", refused], run.stderr
