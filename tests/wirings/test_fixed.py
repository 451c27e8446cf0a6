import copy

import pytest
import torch
from dynamic_reference import product
from reference import plain_forward, relative_error
from torch import nn

from dnw_graph import Discrete, InputError, NeuralGraph
from dnw_graph.propagation import BlockPropagation, MessagePassingPropagation
from dnw_graph.wirings import Fixed

SIZES = (3, 4, 2)
EDGES = torch.tensor([[0, 2, 3, 1, 6, 0], [3, 3, 7, 6, 8, 8]])
PAIRS = [(u, v) for v in range(3, 7) for u in range(3)] + [(u, v) for v in (7, 8) for u in range(7)]
PROPAGATIONS = {
    "block": BlockPropagation(),
    "edge_index": MessagePassingPropagation("edge_index"),
    "csr": MessagePassingPropagation("csr"),
}


def make_graph(edges=EDGES, num_edges=6, **options):
    return NeuralGraph(SIZES, num_edges, wiring=Fixed(edges), **{"node_function": nn.Tanh()} | options).double()


def edge_set(graph):
    return {tuple(pair) for pair in graph.edge_index.T.tolist()}


def test_the_given_edges_are_the_real_ones_in_any_order():
    for order in (range(6), [5, 0, 3, 1, 4, 2]):
        assert edge_set(make_graph(EDGES[:, order])) == {tuple(pair) for pair in EDGES.T.tolist()}


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_only_real_edges_carry_values_and_get_gradients(propagation):
    graph = make_graph(propagation=PROPAGATIONS[propagation])
    weights = dict(zip(PAIRS, graph.candidates.weight.tolist(), strict=True))
    pairs = map(tuple, EDGES.T.tolist())
    real = {pair: torch.tensor(weights[pair], dtype=torch.float64, requires_grad=True) for pair in pairs}
    x = torch.randn(4, 3, dtype=torch.float64)
    states, _ = plain_forward(x, SIZES, real, lambda v, received: received.tanh() if v < 7 else received)
    expected = torch.stack(states[7:], dim=1)
    found = graph(x)
    assert relative_error(found, expected) < 1e-12
    (expected**3 + expected).sum().backward()
    (found**3 + found).sum().backward()
    gradient = dict(zip(PAIRS, graph.candidates.weight.grad.tolist(), strict=True))
    for pair, value in gradient.items():
        assert value == (pytest.approx(real[pair].grad.item(), rel=1e-10) if pair in real else 0)
    assert all(gradient[pair] != 0 for pair in real)


def test_the_edges_stay_whatever_becomes_of_the_weights():
    graph = make_graph()
    before = graph.edge_index
    graph.candidates.weight.data.mul_(torch.linspace(0, 1, graph.num_candidates))
    assert torch.equal(graph.edge_index, before)
    graph.reset_parameters()
    assert torch.equal(graph.edge_index, before)


def test_cycles_and_self_loops_of_a_dynamic_graph():
    edges = torch.tensor([[0, 1, 2, 2], [1, 2, 2, 0]])
    graph = NeuralGraph(
        num_nodes=3,
        num_inputs=1,
        num_outputs=3,
        num_edges=4,
        wiring=Fixed(edges),
        dynamics=Discrete(4),
        node_function=nn.Identity(),
    ).double()
    matrix = torch.zeros(3, 3, dtype=torch.float64)
    for u, v in edges.T.tolist():
        matrix[v, u] = graph.candidates.weight[3 * v + u]
    x = torch.tensor([[2.0]], dtype=torch.float64)
    start = torch.tensor([[2.0, 0, 0]], dtype=torch.float64)
    assert relative_error(graph(x), product(torch.linalg.matrix_power(matrix, 4), start)) < 1e-12


def test_the_edges_travel_in_the_state_dict(tmp_path):
    graph = make_graph()
    assert set(graph.state_dict()) == {"candidates.weight", "num_edges", "rule", "wiring.index", "wiring.checksum"}
    torch.save(graph.state_dict(), tmp_path / "graph.pt")
    other = make_graph(torch.tensor([[0, 0, 0, 0, 1, 1], [3, 4, 5, 6, 3, 7]]))
    x = torch.randn(4, 3, dtype=torch.float64)
    assert not torch.equal(other.eval()(x), graph.eval()(x))
    other.load_state_dict(torch.load(tmp_path / "graph.pt"))
    assert torch.equal(other(x), graph(x))
    assert edge_set(other) == edge_set(graph)
    assert edge_set(copy.deepcopy(graph)) == edge_set(graph)


def test_a_state_with_another_number_of_edges_is_refused():
    state = make_graph(EDGES[:, :5], 5).state_dict()
    with pytest.raises(InputError, match="the state has num_edges = 5, the graph 6"):
        make_graph().load_state_dict(state)


def test_repeated_edges_are_refused():
    edges = EDGES[:, [0, 1, 2, 3, 0, 1]]
    with pytest.raises(InputError, match="stage2: 2 of the fixed edges are repeated"):
        make_graph(edges, name="stage2")


@pytest.mark.parametrize("pair", [(0, 1), (3, 0), (7, 8), (4, 5), (0, 9), (-1, 4)])
def test_pairs_that_are_no_candidates_are_refused(pair):
    edges = EDGES.clone()
    edges[:, 2] = torch.tensor(pair)
    with pytest.raises(InputError, match=rf"\({pair[0]}, {pair[1]}\) is not a candidate edge of this graph"):
        make_graph(edges)


@pytest.mark.parametrize("num_edges", [5, 7])
def test_another_number_of_edges_than_given_is_refused(num_edges):
    with pytest.raises(InputError, match=f"stage2: the rule Fixed has 6 of .* edges; got num_edges = {num_edges}"):
        make_graph(num_edges=num_edges, name="stage2")


@pytest.mark.parametrize("edges", [EDGES.T, EDGES[0], EDGES.unsqueeze(0), torch.empty(3, 2, dtype=torch.long)])
def test_edges_of_another_shape_are_refused(edges, unchecked):
    with pytest.raises(InputError, match=r"edge_index must be \[2, edges\], sources over targets; got"):
        Fixed(edges)


@pytest.mark.parametrize(
    ("edges", "got"),
    [
        (EDGES.float(), "torch.float32"),
        (EDGES > 2, "torch.bool"),
        (EDGES.tolist(), "list"),
        (EDGES.numpy(), "ndarray"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_tensor_of_whole_numbers_is_refused(edges, got, unchecked):
    with pytest.raises(InputError, match=rf"a tensor of integers, such as torch.tensor\(pairs\).T; got {got}$"):
        Fixed(edges)


def test_short_whole_numbers_will_do():
    x = torch.randn(20, 3, 5, 5, dtype=torch.float64)
    for edges in (EDGES.int(), torch.tensor(EDGES.T.tolist(), dtype=torch.int32).T):
        torch.manual_seed(1)
        graph = make_graph(edges)
        torch.manual_seed(1)
        assert torch.equal(graph(x), make_graph()(x))
        assert graph.real_index.dtype == torch.int64


def test_without_a_number_of_edges_it_is_that_of_the_given_ones():
    graph = NeuralGraph(SIZES, wiring=Fixed(EDGES))
    assert graph.num_edges == 6
    assert edge_set(graph) == edge_set(make_graph())
