import pytest
import torch
from torch import nn

from dnw_graph import InputError, NeuralGraph
from dnw_graph.wirings import Fixed

EDGES = torch.tensor([[3, 0, 1], [5, 3, 6]])


def test_given_edges_are_the_real_ones_in_any_order():
    graph = NeuralGraph((3, 2, 2), 3, wiring=Fixed(EDGES), node_function=nn.Identity())
    assert graph.edge_index.tolist() == [[0, 3, 1], [3, 5, 6]]
    graph.candidates.weight.data = torch.arange(1.0, 17.0)
    w = {
        tuple(pair): weight
        for pair, weight in zip(graph.edge_index.T.tolist(), graph.edge_weight.tolist(), strict=True)
    }
    x = torch.tensor([[2.0, 3.0, 5.0]])
    assert graph(x).tolist() == [[2.0 * w[0, 3] * w[3, 5], 3.0 * w[1, 6]]]


def test_given_edges_stay_and_only_they_learn():
    graph = NeuralGraph((3, 2, 2), 3, wiring=Fixed(EDGES), node_function=nn.Identity())
    optimiser = torch.optim.SGD(graph.parameters(), lr=1.0)
    graph(torch.ones(1, 3)).sum().backward()
    assert set(graph.candidates.weight.grad.nonzero().flatten().tolist()) == set(graph.real_index.tolist())
    optimiser.step()
    assert graph.edge_index.tolist() == [[0, 3, 1], [3, 5, 6]]
    other = NeuralGraph((3, 2, 2), 3, wiring=Fixed(torch.tensor([[0, 0, 0], [3, 4, 5]])))
    other.load_state_dict(graph.state_dict(), strict=False)
    assert torch.equal(other.edge_index, graph.edge_index)


@pytest.mark.parametrize(
    ("edges", "k", "message"),
    [
        ([[0, 0], [3, 3]], 2, "1 of the fixed edges are repeated"),
        ([[0, 3], [3, 4]], 2, r"\(3, 4\) is not a candidate"),
        ([[0, 1], [3, 3]], 3, "2 fixed edges were given for num_edges = 3"),
    ],
)
def test_edges_that_do_not_fit_are_refused(edges, k, message):
    with pytest.raises(InputError, match=message):
        NeuralGraph((3, 2, 2), k, wiring=Fixed(torch.tensor(edges)))
