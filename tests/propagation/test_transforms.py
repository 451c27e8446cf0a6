"""Graphs under what looks at every operator: the transforms of torch.func, gradients of several outputs, tracing.

What it is compared with: plain backward passes, of the same graph and image by image.
"""

import copy
from functools import partial

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap

from dnw_graph import CandidateEdges, Discrete, InputError, NeuralGraph, selection
from dnw_graph.node_functions import NormReluConv
from dnw_graph.propagation import MessagePassingPropagation

SIZES = (6, 8, 4)
GRAPHS = {
    "static": {"blocks": SIZES},
    "random": {"blocks": SIZES, "wiring": "random_graph"},
    "layers": {"blocks": SIZES, "candidates": CandidateEdges.adjacent(SIZES)},
    "complete": {"blocks": SIZES, "num_edges": 104},
    "recompute": {"blocks": SIZES, "recompute": True},
    "discrete": {"num_nodes": 12, "num_inputs": 6, "num_outputs": 4, "dynamics": Discrete(3)},
}
X = torch.randn(20, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make(norm="instance", **options):
    torch.manual_seed(0)
    return NeuralGraph(**{"num_edges": 20, "node_function": partial(NormReluConv, norm=norm)} | options).double()


def loss_of(graph):
    """The loss as a function of the parameters and the images."""
    return lambda p, x: functional_call(graph, p, (x,)).pow(3).sum()


def parameters(graph):
    return {name: p.detach() for name, p in graph.named_parameters()}


def gradients(graph, x):
    named = dict(graph.named_parameters())
    return dict(zip(named, torch.autograd.grad(graph(x).pow(3).sum(), list(named.values())), strict=True))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("graph", GRAPHS)
def test_gradients_of_torch_func_are_those_of_a_backward_pass(graph):
    graph = make(**GRAPHS[graph])
    loss, p, expected = loss_of(graph), parameters(graph), gradients(graph, X)
    assert_close(grad(loss)(p, X), expected)
    assert_close(vjp(loss, p, X)[1](torch.ones((), dtype=X.dtype))[0], expected)
    # Derivatives in a direction are the same linear map, hallucinated candidates included.
    direction = {name: torch.randn_like(value) for name, value in p.items()}
    _, change = jvp(lambda p: loss(p, X), (p,), (direction,))
    assert_close(change, sum((expected[name] * direction[name]).sum() for name in p))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("graph", GRAPHS)
def test_gradients_image_by_image(graph, training):
    graph = make(**GRAPHS[graph]).train(training)
    found = vmap(grad(lambda p, x: loss_of(graph)(p, x[None])), (None, 0))(parameters(graph), X)
    expected = [gradients(graph, x[None]) for x in X]
    assert_close(found, {name: torch.stack([each[name] for each in expected]) for name in found})


def test_gradients_image_by_image_of_a_batch_norm_in_evaluation():
    graph = make("batch", blocks=SIZES)
    graph(X)
    graph.eval()
    graph(X)
    found = vmap(grad(lambda p, x: loss_of(graph)(p, x[None])), (None, 0))(parameters(graph), X)
    assert_close({name: each.sum(0) for name, each in found.items()}, gradients(graph, X))


def test_jacobian_of_the_parameters():
    graph = make(blocks=SIZES)
    found = jacrev(lambda p: functional_call(graph, p, (X,)).mean((0, 2, 3)))(parameters(graph))
    outputs = graph(X).mean((0, 2, 3))
    expected = [torch.autograd.grad(out, list(graph.parameters()), retain_graph=True) for out in outputs]
    assert_close(found, dict(zip(found, map(torch.stack, zip(*expected, strict=True)), strict=True)))


@pytest.mark.parametrize("candidates", [None, GRAPHS["layers"]["candidates"]])
def test_gradients_of_several_outputs_at_once(candidates):
    graph = make(blocks=(*SIZES[:2], 3, 4) if candidates is None else SIZES, candidates=candidates, propagation="block")

    def run(x):
        return graph(x).mean((0, 2, 3))

    once, each = (torch.autograd.functional.jacobian(run, X[:2], vectorize=flag) for flag in (True, False))
    assert_close(once, each)
    x = X[:2].clone().requires_grad_()
    out = run(x)
    assert_close(vmap(lambda v: torch.autograd.grad(out, x, v, retain_graph=True)[0])(torch.eye(4).double()), each)


@pytest.mark.parametrize("way", ["sparse", "message_passing", MessagePassingPropagation("csr")])
def test_other_ways_refuse(way):
    graph = make(blocks=SIZES, propagation=way)
    with pytest.raises(InputError, match=r"transformed.*; use propagation='auto'"):
        grad(loss_of(graph))(parameters(graph), X)
    with pytest.raises(InputError, match=r"for several outputs at once; use propagation='block'"):
        torch.autograd.functional.jacobian(lambda x: graph(x).mean((0, 2, 3)), X[:2], vectorize=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("propagation", ["auto", "block"])
def test_a_traced_graph_gives_the_same(propagation, unchecked):
    graph = make(blocks=SIZES, propagation=propagation).eval()
    traced = torch.jit.trace(graph, X)
    assert_close(traced(2 * X), graph(2 * X))


@pytest.mark.filterwarnings("ignore:torch.searchsorted")
@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("graph", ["static", "random", "discrete"])
def test_several_graphs_of_one_shape_at_once(graph, training, on_host, monkeypatch):
    monkeypatch.setattr(selection, "_on_host", lambda weight: on_host)
    graphs = [make(**GRAPHS[graph]).train(training) for _ in range(3)]
    with torch.no_grad():
        for number, each in enumerate(graphs):
            each.candidates.weight.copy_(each.candidates.weight.roll(number))
    stacked = stack_module_state(graphs)
    found = vmap(lambda p, b: functional_call(graphs[0], (p, b), (X,)))(*stacked)
    assert_close(found, torch.stack([each(X) for each in graphs]))


WAYS = {
    "grad": lambda graph: grad(loss_of(graph))(parameters(graph), X),
    "jvp": lambda graph: jvp(lambda p: loss_of(graph)(p, X), (parameters(graph),), (parameters(graph),)),
    "image by image": lambda graph: vmap(grad(loss_of(graph)), (None, 0))(parameters(graph), X[:, None]),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_rule_removes_within_a_transform_is_stored_as_in_a_plain_pass(way):
    plain, graph = (make(blocks=SIZES, wiring="l1_anneal") for _ in range(2))
    for each in (plain, graph):
        each.wiring.step, each.wiring.num_steps = 5, 10  # after the end of the removal
    plain(X)
    WAYS[way](graph)
    expected = graph.candidates.weight.abs().topk(20).indices.sort().values
    found = copy.deepcopy(graph)
    assert torch.equal(found.wiring.real.nonzero().flatten(), expected)
    assert_close(found.state_dict(), plain.state_dict())
    assert_close(found.eval()(X), plain.eval()(X))
