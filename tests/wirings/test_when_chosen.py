"""When the real edges are chosen anew, and when they must not be."""

import copy
import pickle

import pytest
import torch
from reference import top_k
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from dnw_graph import DNW, STR, NeuralGraph, Wiring

X = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))


class CountingDNW(DNW):
    """Counts how often edges are chosen."""

    calls = 0

    def choose(self, view):
        self.calls += 1
        return super().choose(view)


class Restless(Wiring):
    """Other edges at every choice."""

    def choose(self, view):
        return torch.randperm(view.num_candidates)[: view.k].sort().values


def make_graph(wiring=None, **options):
    return NeuralGraph((3, 4, 4, 2), 12, wiring=wiring or CountingDNW(), **options)


def choices(graph, run):
    """How often ``run`` has the graph choose its edges."""
    before = graph.wiring.calls
    run()
    return graph.wiring.calls - before


def assert_edges_fit_weights(graph, x=X):
    """The edges in use are the k of largest |w| of the weights as they are, and the output is made with them."""
    assert graph.real_index.tolist() == top_k(graph.candidates.weight.tolist(), graph.num_edges)
    fresh = NeuralGraph(graph.blocks, graph.num_edges).train(graph.training)
    fresh.load_state_dict(graph.state_dict())
    assert torch.equal(graph(x), fresh(x))


def swap_order(weight):
    """Weights of which other ones are the largest."""
    return 1 / (0.1 + weight.detach().abs())


@pytest.mark.parametrize("propagation", ["block", "message_passing"])
def test_once_per_forward_pass_in_training(propagation):
    graph = make_graph(propagation=propagation)
    for _ in range(3):
        assert choices(graph, lambda: graph(X).sum().backward()) == 1


def test_training_follows_the_optimiser():
    graph = make_graph()
    optimiser = torch.optim.SGD(graph.parameters(), lr=0.5)
    seen = set()
    for _ in range(5):
        expected = top_k(graph.candidates.weight.tolist(), 12)
        optimiser.zero_grad()
        assert choices(graph, lambda: (graph(X) ** 2).mean().backward()) == 1
        assert graph.real_index.tolist() == expected
        optimiser.step()
        seen.add(tuple(expected))
    assert len(seen) > 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_does_not_choose_again(use_reentrant):
    graph = make_graph()
    x = X.clone().requires_grad_()
    assert choices(graph, lambda: checkpoint(graph, x, use_reentrant=use_reentrant).sum().backward()) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_uses_the_edges_of_its_forward_pass(use_reentrant):
    graph = make_graph(Restless())
    gradients = []
    for through in (lambda x: graph(x), lambda x: checkpoint(graph, x, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        graph.zero_grad()
        x = X.clone().requires_grad_()
        (through(x) ** 2).sum().backward()
        gradients.append((x.grad, graph.candidates.weight.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_of_a_whole_model_chooses_once_per_graph(use_reentrant):
    first, second = make_graph(), NeuralGraph((2, 3), 4, wiring=CountingDNW())
    model = nn.Sequential(first, nn.ReLU(), second)
    x = X.clone().requires_grad_()
    for _ in range(2):
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert (first.wiring.calls, second.wiring.calls) == (2, 2)


def test_once_in_evaluation_and_never_again_for_unchanged_weights():
    graph = make_graph()
    graph(X)
    graph.eval()
    assert choices(graph, lambda: graph(X)) == 1
    assert choices(graph, lambda: [graph(X), graph(X), graph.edge_index, graph.edge_weight, graph.eval()(X)]) == 0
    assert_edges_fit_weights(graph)


def test_anew_after_each_switch_to_evaluation():
    graph = make_graph().eval()
    graph(X)
    assert choices(graph, lambda: graph.train().eval()(X)) == 1


def test_anew_after_a_switch_of_a_parent_module():
    graph = make_graph()
    model = nn.Sequential(nn.Sequential(graph), nn.ReLU()).eval()
    model(X)
    graph.candidates.weight.data.copy_(swap_order(graph.candidates.weight))
    model.train()
    model.eval()
    assert_edges_fit_weights(graph)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_anew_after_load_state_dict(assign, nested):
    graph = make_graph().eval()
    model = nn.Sequential(graph) if nested else graph
    model(X)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    key = "0.candidates.weight" if nested else "candidates.weight"
    state[key] = swap_order(state[key])
    model.load_state_dict(state, assign=assign)
    assert choices(graph, lambda: graph(X)) == 1
    assert_edges_fit_weights(graph)


@pytest.mark.parametrize("assign", [False, True])
def test_anew_after_loading_the_state_of_the_rule_alone(assign):
    graph, other = make_graph("random_graph").eval(), make_graph("random_graph")
    graph(X)
    graph.load_state_dict({"wiring.index": other.wiring.index}, strict=False, assign=assign)
    assert torch.equal(graph.real_index, other.real_index)


def change_in_place(graph):
    with torch.no_grad():
        graph.candidates.weight.copy_(swap_order(graph.candidates.weight))


def change_storage(graph):
    graph.candidates.weight.data = swap_order(graph.candidates.weight)


def replace_object(graph):
    graph.candidates.weight = nn.Parameter(swap_order(graph.candidates.weight))


def replace_object_on_the_same_storage(graph):
    """The other object has been changed as often as the first one: only its identity tells them apart."""
    weight = graph.candidates.weight
    other, swapped = nn.Parameter(weight.data), swap_order(weight)
    with torch.no_grad():
        while other._version < weight._version:
            other.copy_(swapped)
    graph.candidates.weight = other


def change_by_vector(graph):
    vector = parameters_to_vector(graph.parameters())
    vector_to_parameters(swap_order(vector), graph.parameters())


def change_dtype(graph):
    graph.to(torch.float16).to(torch.float32)


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_storage,
        replace_object,
        replace_object_on_the_same_storage,
        change_by_vector,
        change_dtype,
        NeuralGraph.reset_parameters,
    ],
)
def test_anew_in_evaluation_after_a_change_of(change):
    graph = make_graph().eval()
    graph(X)
    change(graph)
    assert choices(graph, lambda: graph(X)) == 1
    assert_edges_fit_weights(graph)
    assert choices(graph, lambda: graph(X)) == 0


def test_anew_when_a_new_storage_takes_the_place_of_the_old_one():
    graph = NeuralGraph((20, 50), 100, wiring=CountingDNW(), input_function=False).eval()
    weight, x = graph.candidates.weight, torch.zeros(1, 20)
    for _ in range(30):  # the allocator offers the freed place in about every third round
        graph(x)
        place, other = weight.data_ptr(), torch.rand(1000)
        weight.data = torch.zeros(1000)
        copies = [other.clone() for _ in range(50)]
        weight.data = next((copy for copy in copies if copy.data_ptr() == place), other)
        assert choices(graph, lambda: graph(x)) == 1


def test_anew_with_weights_passed_by_functional_call():
    graph = make_graph().eval()
    usual = graph(X)
    other = {"candidates.weight": swap_order(graph.candidates.weight)}
    changed = functional_call(graph, other, (X,))
    reference = copy.deepcopy(graph)
    reference.load_state_dict(other, strict=False)
    assert torch.equal(changed, reference(X))
    assert torch.equal(graph(X), usual)


def test_anew_with_weights_made_in_inference_mode():
    graph = make_graph().eval()
    expected = graph(X)
    with torch.inference_mode():
        twin = copy.deepcopy(graph)
        assert torch.equal(twin(X), expected)
        change_in_place(twin)  # leaves no trace: such tensors keep no version
        assert_edges_fit_weights(twin)


def step_fused(graph):
    graph.candidates.weight.grad = graph.candidates.weight.detach() - swap_order(graph.candidates.weight)
    torch.optim.SGD([graph.candidates.weight], lr=1.0, fused=True).step()


def copy_data(graph):
    graph.candidates.weight.data.copy_(swap_order(graph.candidates.weight))


def copy_average_in(graph):
    """As libraries for moving averages do, see also :func:`step_adam` for whoever trains in evaluation mode."""
    for parameter in graph.parameters():
        average = swap_order(parameter)
        parameter.data.copy_(average.data)


def step_adam(graph):
    graph.candidates.weight.grad = graph.candidates.weight.detach() - swap_order(graph.candidates.weight)
    torch.optim.Adam(graph.parameters(), lr=0.3, fused=True).step()


def write_by_numpy(graph):
    graph.candidates.weight.detach().numpy()[:] = swap_order(graph.candidates.weight).numpy()


@pytest.mark.parametrize("change", [step_fused, step_adam, copy_data, copy_average_in, write_by_numpy])
@pytest.mark.parametrize("width", [4, 60])
def test_anew_in_evaluation_after_changes_that_leave_no_record(change, width):
    graph = NeuralGraph((3, width, width, 2), 40, wiring=CountingDNW()).eval()
    graph(X)
    change(graph)
    assert choices(graph, lambda: graph(X)) == 1
    assert_edges_fit_weights(graph)
    assert choices(graph, lambda: graph(X)) == 0


@pytest.mark.parametrize("place", [0, 7, 46])
def test_a_small_graph_is_compared_whole(place):
    graph = NeuralGraph((3, 5, 4), 11, wiring=CountingDNW()).eval()
    graph(X)
    graph.candidates.weight.data[place] += 10
    assert_edges_fit_weights(graph)


def test_a_real_edge_of_a_large_graph_and_a_channel_of_many_are_noticed():
    graph = NeuralGraph((100, 100), 50, wiring=CountingDNW(), input_function=False).eval()
    for part in (graph.real_index[-1], slice(5000, 5100), slice(7, None, 100)):
        graph.candidates.weight.data[part] *= 1e-3
        assert graph.real_index.tolist() == top_k(graph.candidates.weight.tolist(), 50)


def test_update_wiring_is_for_single_weights_of_a_large_graph():
    graph = NeuralGraph((100, 100), 50, wiring=CountingDNW(), input_function=False).eval()
    assert 1234 not in graph.real_index
    graph.candidates.weight.data[1234] = 10
    assert 1234 not in graph.real_index
    graph.update_wiring()
    assert 1234 in graph.real_index


def test_anew_after_a_change_of_a_threshold_alone():
    graph = NeuralGraph((3, 60, 60, 2), wiring=STR(-3.0)).eval()
    graph(X)
    before = graph.num_real_edges
    for parameter in graph.wiring.parameters():
        parameter.data.add_(1)
    kept = graph.candidates.weight.abs() > graph.wiring.threshold.sigmoid()
    assert graph.num_real_edges == int(kept.sum()) < before


@pytest.mark.parametrize("change", [step_fused, copy_data])
def test_changes_that_leave_no_trace_are_seen_in_training_and_at_the_switch(change):
    graph = make_graph()
    graph(X)
    change(graph)
    assert_edges_fit_weights(graph)
    change(graph)
    graph.eval()
    assert_edges_fit_weights(graph)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
@pytest.mark.parametrize("nested", [False, True])
def test_copies_have_a_wiring_of_their_own(duplicate, nested):
    graph = make_graph().eval()
    expected = graph(X)
    twin = duplicate(nn.Sequential(graph))[0] if nested else duplicate(graph)
    assert torch.equal(twin(X), expected)
    change_in_place(twin)
    assert_edges_fit_weights(twin)
    twin.load_state_dict(graph.state_dict())
    assert torch.equal(twin(X), expected)
    assert choices(graph, lambda: graph(X)) == 0
    assert torch.equal(graph(X), expected)


def test_a_graph_that_has_run_is_saved_like_one_that_has_not():
    graph = make_graph("dnw").eval()
    size = len(pickle.dumps(graph))
    graph(X)
    assert len(pickle.dumps(graph)) == size


def test_a_wiring_object_serves_several_graphs():
    wiring = CountingDNW()
    first, second = make_graph(wiring), make_graph(wiring)
    first(X)
    assert (first.wiring.calls, second.wiring.calls, wiring.calls) == (1, 0, 0)
