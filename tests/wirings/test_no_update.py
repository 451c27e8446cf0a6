import pytest
import torch
from reference import top_k

from dnw_graph import NeuralGraph


def two_edges(propagation="block"):
    """Two inputs and one output, without a node function: I = 0.5 a, and hallucinated 0.4 b."""
    graph = NeuralGraph((2, 1), 1, wiring="no_update", input_function=False, propagation=propagation)
    with torch.no_grad():
        graph.candidates.weight.copy_(torch.tensor([0.5, 0.4]))
    return graph


@pytest.mark.parametrize("propagation", ["block", "message_passing"])
def test_a_hallucinated_edge_becomes_real_when_the_real_one_falls_below_it(propagation):
    graph = two_edges(propagation)
    optimiser = torch.optim.SGD(graph.parameters(), lr=0.2)
    graph(torch.ones(1, 2)).sum().backward()
    assert graph.candidates.weight.grad.tolist() == [1.0, 0.0]
    optimiser.step()
    torch.testing.assert_close(graph.candidates.weight.tolist(), [0.3, 0.4])
    assert graph.real_index.tolist() == [1]


def test_no_pull_makes_a_hallucinated_edge_real_while_the_real_one_grows():
    graph = two_edges()
    optimiser = torch.optim.SGD(graph.parameters(), lr=0.2)
    for _ in range(10):
        optimiser.zero_grad()
        (-graph(torch.tensor([[0.01, 100.0]]))).sum().backward()  # b would lower the loss far more
        optimiser.step()
    assert graph.real_index.tolist() == [0]
    assert graph.candidates.weight[1] == torch.tensor(0.4)


def test_momentum_and_weight_decay_move_hallucinated_weights():
    graph = two_edges()
    optimiser = torch.optim.SGD(graph.parameters(), lr=0.1, momentum=0.5, weight_decay=0.5)
    for _ in range(2):
        optimiser.zero_grad()
        (-graph(torch.ones(1, 2))).sum().backward()
        optimiser.step()
    # Velocity 0.5 · 0.4 = 0.2 takes the weight to 0.38; 0.5 · 0.2 + 0.5 · 0.38 = 0.29 takes it to 0.351.
    torch.testing.assert_close(graph.candidates.weight[1].item(), 0.351)


def test_an_edge_that_was_real_keeps_its_momentum_while_it_is_hallucinated():
    graph = two_edges()
    optimiser = torch.optim.SGD(graph.parameters(), lr=0.2, momentum=0.5)
    for _ in range(2):
        optimiser.zero_grad()
        graph(torch.ones(1, 2)).sum().backward()
        optimiser.step()
    # a falls by 0.2 to 0.3, is hallucinated, and falls by half as much again; b falls by 0.2.
    torch.testing.assert_close(graph.candidates.weight.tolist(), [0.2, 0.2])


@pytest.mark.parametrize("k", [1, 9, 26])
def test_edges_are_the_k_of_largest_magnitude(k):
    graph = NeuralGraph((3, 4, 2), k, wiring="no_update")
    graph.candidates.weight.data[5:9] = -graph.candidates.weight.data[4]  # ties, of both signs
    assert graph.real_index.tolist() == top_k(graph.candidates.weight.tolist(), k)


def test_it_has_no_state():
    assert not any(key.startswith("wiring") for key in NeuralGraph((3, 2), 3, wiring="no_update").state_dict())
