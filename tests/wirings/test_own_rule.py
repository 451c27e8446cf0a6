"""A user's own rule: a short subclass, without touching the package."""

import pytest
import torch
from reference import top_k

from dnw_graph import InputError, NeuralGraph, Wiring


class StrongestPositive(Wiring):
    updates_hallucinated = True

    def choose(self, weight, num_edges, name):
        return weight.topk(num_edges).indices.sort().values


class OneEdgeLess(Wiring):
    """Keeps state: the number of choices; gives only real edges a gradient."""

    updates_hallucinated = False

    def setup(self, candidates, num_edges, name):
        self.register_buffer("count", torch.tensor(0))

    def choose(self, weight, num_edges, name):
        self.count += 1
        return torch.arange(num_edges - 1)


@pytest.mark.parametrize("propagation", ["block", "message_passing"])
def test_own_rule_chooses_the_edges(propagation):
    graph = NeuralGraph((3, 4, 2), 6, wiring=StrongestPositive(), propagation=propagation)
    x = torch.rand(2, 3, 5, 5)
    (graph(x) ** 2).sum().backward()
    weights = graph.candidates.weight.tolist()
    assert graph.real_index.tolist() == sorted(sorted(range(26), key=lambda i: -weights[i])[:6])
    assert graph.real_index.tolist() != top_k(weights, 6)
    assert (graph.edge_weight > 0).all()


@pytest.mark.parametrize("propagation", ["block", "message_passing"])
def test_own_rule_may_choose_fewer_edges_and_keep_state(propagation):
    graph = NeuralGraph((3, 4, 2), 6, wiring=OneEdgeLess(), propagation=propagation)
    (graph(torch.rand(2, 3, 5, 5)) ** 2).sum().backward()
    assert (graph.candidates.weight.grad[5:] == 0).all()
    assert graph.state_dict()["wiring.count"] == 1


@pytest.mark.parametrize("wiring", [None, 3, StrongestPositive])
def test_what_is_no_rule_is_refused(wiring, unchecked):
    with pytest.raises(InputError, match="name or a Wiring object"):
        NeuralGraph((3, 4), 2, wiring=wiring)
