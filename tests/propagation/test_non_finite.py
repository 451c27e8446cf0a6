"""Inputs that are NaN or infinite travel over real edges, in every propagation."""

import pytest
import torch

from dnw_graph import Discrete, NeuralGraph
from dnw_graph.compaction import compact
from dnw_graph.propagation import BlockPropagation
from dnw_graph.wirings import Fixed

# Nodes 0 … 2 flow in, 3 … 6 are inner nodes, 7 … 9 flow out. Node 1 has no edge; node 0 leads to 3, and so to 7.
EDGES = torch.tensor([[0, 2, 2, 3, 4, 5, 6, 2], [3, 4, 5, 7, 8, 8, 9, 9]])
PROPAGATIONS = ["block", "sparse", "message_passing", "auto"]
VALUES = [torch.inf, -torch.inf, torch.nan]


def static(propagation, wiring=None):
    torch.manual_seed(1)
    wiring = Fixed(EDGES) if wiring is None else wiring
    return NeuralGraph((3, 4, 3), wiring=wiring, propagation=propagation, input_function=False)


def discrete(propagation):
    torch.manual_seed(1)
    nodes = {"num_nodes": 10, "num_inputs": 3, "num_outputs": 3}
    return NeuralGraph(**nodes, wiring=Fixed(EDGES), dynamics=Discrete(2), propagation=propagation)


def images(value=0.0, node=1, where=(slice(None), slice(None), slice(None))):
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(2))
    x[:, node][where] = value
    return x


@pytest.mark.parametrize("where", [(slice(None),) * 3, (2, 3, 4)])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("make", [static, discrete])
def test_an_input_without_edges_is_felt_nowhere(make, propagation, training, value, where):
    graph = make(propagation).double().train(training)
    expected = graph(images(0.0, where=where).double())
    assert expected.isfinite().all()
    found = graph(images(value, where=where).double())
    torch.testing.assert_close(found, expected)
    gradients = []
    for out in (expected, found):
        graph.zero_grad()
        out.square().sum().backward()
        gradients.append({name: p.grad for name, p in graph.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_an_initial_state_without_edges_is_felt_nowhere(propagation, value, batch):
    graph = discrete(propagation).eval()
    x, states = torch.randn(batch, 3, 5, 6), torch.randn(batch, 10, 5, 6)
    others = states.clone()
    others[:, 8] = value
    expected = graph(x, initial_states=states)
    assert expected.isfinite().all()
    torch.testing.assert_close(graph(x, initial_states=others), expected)
    others[:, 5] = value  # which leads to node 8 alone
    found = graph(x, initial_states=others)
    torch.testing.assert_close(found[:, [0, 2]], expected[:, [0, 2]])


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_an_input_is_felt_where_its_edges_lead(propagation, value):
    graph = static(propagation).eval()
    where = 2, 3, 4
    out, expected = graph(images(value, 0, where)), graph(images(0.0, 0, where))
    # Node 3 receives it at one place, and its convolution spreads it to the neighbours.
    far = torch.ones(5, 6, dtype=torch.bool)
    far[2:5, 3:6] = False
    others = torch.ones_like(out, dtype=torch.bool)
    others[2, 0] = far
    torch.testing.assert_close(out[others], expected[others])
    if value != -torch.inf:  # of which ReLU makes 0
        assert not out[2, 0, 3, 4].isfinite()
    torch.testing.assert_close(out, static("message_passing").eval()(images(value, 0, where)), equal_nan=True)
    torch.testing.assert_close(compact(graph)(images(value, 0, where)), out, equal_nan=True)


@pytest.mark.parametrize("value", VALUES)
def test_also_where_hallucinated_edges_learn(value):
    # Of an input that is not finite no candidate has a gradient that is; all other gradients are those of edges.
    gradients = []
    for propagation in PROPAGATIONS[:3]:
        graph = static(propagation, "dnw")
        graph.rewire("dnw", 9)
        with torch.no_grad():
            graph.candidates.weight[graph.candidates.flat_index(torch.tensor([[1] * 7, [3, 4, 5, 6, 7, 8, 9]]))] = 0
        out = graph(images(value))
        assert out.isfinite().all()
        out.square().sum().backward()
        gradients.append(graph.candidates.weight.grad)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient.isfinite(), gradients[0].isfinite())
        finite = gradient.isfinite()
        torch.testing.assert_close(gradient[finite], gradients[0][finite])
        source = graph.candidates.pairs(torch.arange(len(gradient)))[0]
        assert set(source[~finite].tolist()) == {1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    graph = static("block").to(dtype).eval()
    torch.testing.assert_close(graph(images(torch.inf).to(dtype)), graph(images().to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert static("block").eval()(images(torch.inf)).isfinite().all()


def test_a_sum_that_overflows_is_no_infinite_input():
    largest = torch.finfo(torch.float32).max
    x = torch.full((2, 3, 4, 4), largest / 4)
    assert not x.sum().isfinite()
    graph = static("block").eval()
    with torch.no_grad():
        graph.candidates.weight.mul_(1e-30)
    propagate = BlockPropagation()(graph_edges(graph), x)
    assert propagate.product.__module__ == BlockPropagation.__module__


def graph_edges(graph):
    from dnw_graph.propagation import RealEdges

    return RealEdges(graph.candidates, index := graph.real_index, graph.candidates.weight, index)
