import pytest
import torch
from pairs import every_pair
from torch import nn

from dnw_graph import DNW, Discrete, InputError, NeuralGraph, RandomGraph
from dnw_graph.wirings import Fixed, Wiring

EDGES = torch.tensor([[0, 1, 3], [3, 4, 7]])


def static():
    return NeuralGraph((3, 4, 2), 20, node_function=nn.Tanh(), name="stage2").double()


def discrete():
    return NeuralGraph(
        num_nodes=9,
        num_inputs=3,
        num_outputs=2,
        num_edges=20,
        dynamics=Discrete(2),
        node_function=nn.Tanh(),
        name="loop",
    ).double()


GRAPHS = [static, discrete]


@pytest.fixture(params=GRAPHS)
def graph(request):
    return request.param()


@pytest.fixture
def x():
    return torch.randn(4, 3, dtype=torch.float64)


class Refusing(Wiring):
    """Fails after it has looked at the graph."""

    def setup(self, view):
        self.scores = view.weight.clone()
        raise InputError(f"{view.name}: no")


REFUSED = {
    "unknown name": ("dnv", 5, "unknown wiring 'dnv': did you mean 'dnw'"),
    "too many edges": (DNW(), 10_000, "num_edges = 10,000 is more than the"),
    "no edges": ("dnw", 0, "num_edges must be an integer >= 1; got 0"),
    "repeated edge": (Fixed(EDGES[:, [0, 1, 1]]), 3, "1 of the fixed edges are repeated"),
    "no candidate": (Fixed(torch.tensor([[0], [99]])), 1, r"\(0, 99\) is not a candidate edge"),
    "wrong count": (Fixed(EDGES), 4, "the rule Fixed has 3 of .* edges; got num_edges = 4"),
    "fails late": (Refusing(), 5, "no$"),
}


@every_pair(graph=GRAPHS, case=REFUSED, training=[True, False], before=["dnw", "random_graph"], indirect=["graph"])
def test_a_refused_rewiring_changes_nothing(before, training, case, graph, x):
    graph.rewire(before, 20)
    graph.train(training)
    expected = graph(x)
    rule, edges = graph.wiring, graph.edge_index
    state = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    wiring, num_edges, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        graph.rewire(wiring, num_edges)
    assert graph.wiring is rule
    assert graph.num_edges == 20
    assert torch.equal(graph.edge_index, edges)
    assert torch.equal(graph(x), expected)
    assert set(graph.state_dict()) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in graph.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_the_next_pass_uses_the_new_edges(training, graph, x):
    graph.train(training)
    weight = graph.candidates.weight.detach().clone()
    first = graph(x)
    graph.rewire("dnw", graph.num_candidates)
    dense = graph(x)
    assert graph.num_edges == graph.edge_index.size(1) == graph.num_candidates
    graph.rewire(Fixed(EDGES), 3)
    assert graph.edge_index.T.tolist() == EDGES.T.tolist()
    few = graph(x)
    graph.rewire("dnw", 20)
    assert torch.equal(graph(x), first)
    assert not torch.equal(dense, first)
    assert not torch.equal(few, first)
    assert torch.equal(graph.candidates.weight, weight)


def test_a_random_graph_is_drawn_from_the_weights_as_they_are_now(graph, x):
    with torch.no_grad():
        graph.candidates.weight.uniform_(-1, 1)
    largest = graph.candidates.weight.abs().topk(7).indices.sort().values
    graph.rewire("random_graph", 7)
    graph.candidates.weight.data.uniform_(-1, 1)
    assert torch.equal(graph.real_index, largest)
    graph(x).sum().backward()
    assert int((graph.candidates.weight.grad != 0).sum()) <= 7


def test_the_rule_is_copied_and_takes_the_mode_of_the_graph(graph):
    rule = RandomGraph(separate_scores=True)
    graph.eval().rewire(rule, 5)
    assert graph.wiring is not rule
    assert rule.index.numel() == 0
    assert not graph.wiring.training
    graph.train().rewire(rule, 5)
    assert graph.wiring.training


def test_the_state_dict_follows_the_rule(graph):
    assert "wiring.index" not in graph.state_dict()
    graph.rewire(Fixed(EDGES), 3)
    assert torch.equal(graph.state_dict()["wiring.index"], graph.candidates.flat_index(EDGES).sort().values)
    graph.rewire("dnw", 3)
    assert "wiring.index" not in graph.state_dict()
