import pytest
import torch
from reference import top_k
from torch import nn

from dnw_graph import CandidateEdges, NeuralGraph, RandomGraph
from dnw_graph.sparse_layers import sparsify, weight_graphs

X = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def train(graph, steps=6, **options):
    optimiser = torch.optim.SGD(graph.parameters(), lr=0.5, **options)
    for _ in range(steps):
        optimiser.zero_grad()
        (graph(X) ** 2).mean().backward()
        optimiser.step()


def test_edges_are_those_of_largest_initial_weight():
    graph = NeuralGraph((3, 4, 2), 9, wiring="random_graph")
    assert graph.real_index.tolist() == top_k(graph.candidates.weight.tolist(), 9)


@pytest.mark.parametrize("propagation", ["block", "message_passing"])
def test_only_real_edges_get_a_gradient(propagation):
    graph = NeuralGraph((3, 4, 2), 9, wiring=RandomGraph(), propagation=propagation)
    dense = NeuralGraph((3, 4, 2), 9, wiring="dnw", propagation=propagation)
    dense.load_state_dict({key: value for key, value in graph.state_dict().items() if "wiring." not in key})
    for model in (graph, dense):
        (model(X) ** 2).sum().backward()
    real = torch.zeros(26, dtype=torch.bool)
    real[graph.real_index] = True
    assert (graph.candidates.weight.grad[~real] == 0).all()
    torch.testing.assert_close(graph.candidates.weight.grad[real], dense.candidates.weight.grad[real])
    assert (graph.candidates.weight.grad[real] != 0).any()


def test_edges_stay_through_training_and_evaluation():
    graph = NeuralGraph((3, 4, 2), 9, wiring="random_graph")
    edges = graph.edge_index
    start = graph.candidates.weight.detach().clone()
    train(graph, momentum=0.9)
    assert torch.equal(graph.edge_index, edges)
    weight = graph.candidates.weight.detach()
    assert graph.real_index.tolist() != top_k(weight.tolist(), 9)  # the largest are others by now
    real = torch.zeros(26, dtype=torch.bool)
    real[graph.real_index] = True
    assert torch.equal(weight[~real], start[~real])
    assert not torch.equal(weight[real], start[real])
    assert torch.equal(graph.eval().edge_index, edges)


def test_weight_decay_on_unchosen_weights_does_not_move_the_edges():
    graph = NeuralGraph((3, 4, 2), 9, wiring="random_graph")
    edges = graph.edge_index
    train(graph, momentum=0.9, weight_decay=0.1)
    assert torch.equal(graph.edge_index, edges)


def test_edges_survive_a_checkpoint(tmp_path):
    graph = NeuralGraph((3, 4, 2), 9, wiring="random_graph")
    train(graph)
    torch.save(graph.state_dict(), tmp_path / "graph.pt")
    other = NeuralGraph((3, 4, 2), 9, wiring="random_graph").eval()
    assert not torch.equal(other.edge_index, graph.edge_index)
    other(X)
    other.load_state_dict(torch.load(tmp_path / "graph.pt"))
    assert torch.equal(other.edge_index, graph.edge_index)
    assert torch.equal(other(X), graph.eval()(X))


def test_only_this_rule_saves_its_edges():
    assert "wiring.index" in NeuralGraph((3, 2), 3, wiring="random_graph").state_dict()
    assert not any(key.startswith("wiring") for key in NeuralGraph((3, 2), 3).state_dict())


def test_separate_scores_leave_the_weights_uniform():
    k, bound = 1000, 0.1
    graph = NeuralGraph((100, 100), k, wiring=RandomGraph(separate_scores=True))
    plain = NeuralGraph((100, 100), k, wiring=RandomGraph())
    # |w| of a uniform weight has mean bound/2 and standard deviation bound/√12; the top tenth lies above 0.9·bound.
    assert abs(graph.edge_weight.abs().mean() - bound / 2) < 5 * bound / (12 * k) ** 0.5
    assert plain.edge_weight.abs().min() > 0.85 * bound


def test_reset_draws_the_edges_anew():
    graph = NeuralGraph((3, 4, 2), 9, wiring="random_graph").eval()
    before = graph.edge_index
    graph.reset_parameters()
    assert not torch.equal(graph.edge_index, before)
    assert graph.real_index.tolist() == top_k(graph.candidates.weight.tolist(), 9)


def test_setup_uses_the_candidates_of_its_graph():
    candidates = CandidateEdges.adjacent((3, 4, 2))
    graph = NeuralGraph((3, 4, 2), 9, wiring="random_graph", candidates=candidates)
    assert graph.candidates.blocks == candidates.blocks
    assert int(graph.real_index.max()) < candidates.num_candidates


def test_edges_among_equal_weights_are_drawn():
    weight = torch.zeros(4, 64)
    weight[0, :8] = 1.0
    found = []
    for _ in range(3):
        model = nn.Linear(64, 4)
        model.weight.data.copy_(weight)
        sparsify(model, 0.5, "random_graph")
        (graph,) = weight_graphs(model).values()
        assert len(graph.real_index) == 128
        assert graph.real_index[:8].tolist() == list(range(8))
        per_target = torch.bincount(graph.real_index // 64, minlength=4)
        assert (per_target > 16).all()  # 28 to 36 on average
        found.append(graph.real_index.tolist())
    assert found[0] != found[1] != found[2]


def test_a_graph_without_values_can_be_made():
    with torch.device("meta"):
        graph = NeuralGraph((3, 4, 2), 9, wiring="random_graph")
    assert graph.real_index.shape == (9,)
