import pytest
import torch
from reference import static_pairs, top_k

from dnw_graph import DNW, NeuralGraph


@pytest.mark.parametrize("wiring", ["dnw", DNW()])
@pytest.mark.parametrize("k", [1, 7, 26])
def test_real_edges_are_the_k_of_largest_magnitude(wiring, k):
    graph = NeuralGraph((3, 4, 2), k, wiring=wiring)
    weight = graph.candidates.weight.data
    weight[5:9] = weight[4]  # ties
    expected = top_k(weight.tolist(), k)
    pairs = static_pairs((3, 4, 2))
    assert graph.real_index.tolist() == expected
    assert graph.edge_index.T.tolist() == [list(pairs[i]) for i in expected]
    assert torch.equal(graph.edge_weight, weight[expected])


def test_a_hallucinated_edge_displaces_the_weakest_real_one():
    # Two inputs a, b and one output: I = 0.5 a. The loss -I·b pulls the output towards b.
    graph = NeuralGraph((2, 1), 1, input_function=False)
    with torch.no_grad():
        graph.candidates.weight.copy_(torch.tensor([0.5, 0.4]))
    optimiser = torch.optim.SGD(graph.parameters(), lr=0.2)
    x = torch.tensor([[2.0, 1.0]])
    (-graph(x)).sum().backward()
    assert graph.edge_index.tolist() == [[0], [2]]
    assert graph.candidates.weight.grad.tolist() == [-2.0, -1.0]
    with torch.no_grad():
        graph.candidates.weight.grad[0] = 0.5  # as if the loss pushed away from a
    optimiser.step()
    assert graph.edge_index.tolist() == [[1], [2]]
    torch.testing.assert_close(graph(x), torch.tensor([[0.6]]))


def test_every_candidate_gets_a_gradient():
    graph = NeuralGraph((3, 4, 2), 13)
    (graph(torch.rand(4, 3, 5, 5)) ** 2).sum().backward()
    grad = graph.candidates.weight.grad
    into_outputs = grad[3 * 4 :]
    assert (into_outputs != 0).all()
