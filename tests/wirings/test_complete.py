import pytest
import torch

from dnw_graph import Complete, InputError, NeuralGraph

X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [1, 9, 26])
def test_all_candidates_are_real_and_the_graph_remembers_k(k):
    graph = NeuralGraph((3, 4, 2), k, wiring="complete")
    for mode in (True, False):
        graph.train(mode)
        assert graph.real_index.tolist() == list(range(26))
        assert (graph.num_real_edges, graph.num_edges) == (26, k)
        assert graph.to_data().num_edges == 26


def test_it_is_any_rule_with_all_candidates():
    complete = NeuralGraph((3, 4, 2), 9, wiring=Complete())
    dnw = NeuralGraph((3, 4, 2), wiring="dnw")
    state = complete.state_dict()
    del state["num_edges"]  # which are not those of the other graph
    dnw.load_state_dict(state)
    outputs = complete(X), dnw(X)
    assert torch.equal(*outputs)
    for out in outputs:
        (out**2).sum().backward()
    assert torch.equal(complete.candidates.weight.grad, dnw.candidates.weight.grad)
    assert (complete.candidates.weight.grad[12:] != 0).all()


def test_weights_that_are_no_numbers_are_refused():
    graph = NeuralGraph((3, 4, 2), 9, wiring="complete", name="stage3")
    graph.candidates.weight.data[4] = float("nan")
    with pytest.raises(InputError, match="stage3: 1 of 26 candidate weights are NaN or infinite"):
        graph(X)
