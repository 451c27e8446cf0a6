"""When the real edges of graphs and of layers are chosen anew, and when they must not be."""

import copy
import pickle

import pytest
import torch
from counting import CountingDNW, Restless, choices, graphs, swap_order
from reference import top_k
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from dnw_graph import DNW, STR, NeuralGraph, RandomGraph, sparsify

MAPS = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
ROWS = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1))


class Attends(nn.Module):
    """Attention, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.shared = nn.Linear(4, 4)

    def forward(self, x):
        return self.shared(self.shared(self.attention(x, x, x)[0]).relu())


def make_graph(wiring=None, **options):
    return NeuralGraph((3, 4, 4, 2), 12, wiring=wiring or CountingDNW(), **options)


def make_layers(wiring=None, distribution="uniform"):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 4), Attends())
    sparsify(model, 0.5, wiring or CountingDNW(), distribution=distribution)
    return model


def make_one_ranking(wiring=None):
    return make_layers(wiring, "global")


every_kind = pytest.mark.parametrize("make", [make_graph, make_layers, make_one_ranking])


def input_of(model):
    return MAPS if isinstance(model, NeuralGraph) else ROWS


def assert_edges_fit_weights(model, make):
    """The edges in use are the k of largest |w| of the weights as they are, and the output is made with them."""
    for graph in graphs(model):
        assert graph.real_index.tolist() == top_k(graph.view().weight.tolist(), graph.num_edges)
    fresh = make(DNW()).train(model.training)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(input_of(model)), fresh(input_of(model)))


def place_of(model):
    """The module that holds the first candidate weights, and their name there."""
    parameter = graphs(model)[0].weights[0].parameter
    return next(
        (module, name)
        for module in model.modules()
        for name, each in module.named_parameters(recurse=False)
        if each is parameter
    )


def weight_of(model):
    return graphs(model)[0].weights[0].parameter


@every_kind
def test_once_per_forward_pass_in_training(make):
    model = make()
    for _ in range(3):
        assert choices(model, lambda: model(input_of(model)).sum().backward()) == {(1, 0)}


@every_kind
def test_training_follows_the_optimiser(make):
    model = make()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = set()
    for _ in range(5):
        expected = [top_k(graph.view().weight.tolist(), graph.num_edges) for graph in graphs(model)]
        optimiser.zero_grad()
        assert choices(model, lambda: (model(input_of(model)) ** 2).mean().backward()) == {(1, 0)}
        assert [graph.real_index.tolist() for graph in graphs(model)] == expected
        optimiser.step()
        seen.add(str(expected))
    assert len(seen) > 1


@every_kind
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_uses_the_edges_of_its_forward_pass(make, use_reentrant):
    model = make(Restless())
    gradients = []
    for through in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        model.zero_grad()
        x = input_of(model).clone().requires_grad_()
        (through(x) ** 2).sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])


@every_kind
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_does_not_choose_again(make, use_reentrant):
    model = make()
    x = input_of(model).clone().requires_grad_()
    for _ in range(2):
        run = lambda: checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()  # noqa: E731
        assert choices(model, run) == {(1, 0)}


@every_kind
def test_once_in_evaluation_and_never_again_for_unchanged_weights(make):
    model = make()
    x = input_of(model)
    model(x)
    model.eval()
    assert choices(model, lambda: model(x)) == {(0, 1)}
    looks = lambda: [(graph.real_index, graph.edge_weight) for graph in graphs(model)]  # noqa: E731
    assert choices(model, lambda: [model(x), model(x), looks(), model.eval()(x)]) == set()
    assert_edges_fit_weights(model, make)


@every_kind
def test_anew_after_each_switch_to_evaluation(make):
    model = make().eval()
    model(input_of(model))
    assert choices(model, lambda: model.train().eval()(input_of(model))) == {(0, 1)}


def test_anew_after_a_switch_of_a_parent_module():
    graph = make_graph()
    model = nn.Sequential(nn.Sequential(graph), nn.ReLU()).eval()
    model(MAPS)
    copy_data(graph)
    model.train()
    model.eval()
    assert_edges_fit_weights(graph, make_graph)


@every_kind
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_anew_after_load_state_dict(make, assign, nested):
    inner = make().eval()
    model = nn.Sequential(inner) if nested else inner
    model(input_of(inner))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key in state:
        if key.endswith(("candidates.weight", "original")):
            state[key] = swap_order(state[key])
    model.load_state_dict(state, assign=assign)
    assert choices(inner, lambda: inner(input_of(inner))) == {(0, 1)}
    assert_edges_fit_weights(inner, make)


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_anew_after_loading_the_state_of_the_rule_alone(make, assign):
    model, other = make("random_graph").eval(), make(RandomGraph(separate_scores=True))
    model(input_of(model))
    state = {key: value for key, value in other.state_dict().items() if "wiring." in key}
    model.load_state_dict(state, strict=False, assign=assign)
    for graph, twin in zip(graphs(model), graphs(other), strict=True):
        assert torch.equal(graph.real_index, twin.real_index)


def change_in_place(model):
    with torch.no_grad():
        weight_of(model).copy_(swap_order(weight_of(model)))


def change_storage(model):
    weight_of(model).data = swap_order(weight_of(model))


def replace_object(model):
    setattr(*place_of(model), nn.Parameter(swap_order(weight_of(model))))


def replace_object_on_the_same_storage(model):
    """The other object has been changed as often as the first one: only its identity tells them apart."""
    weight = weight_of(model)
    other, swapped = nn.Parameter(weight.data), swap_order(weight)
    with torch.no_grad():
        while other._version < weight._version:
            other.copy_(swapped)
    setattr(*place_of(model), other)


def change_by_vector(model):
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(swap_order(vector), model.parameters())


def change_dtype(model):
    model.to(torch.float16).to(torch.float32)


def step_fused(model):
    weight = weight_of(model)
    weight.grad = weight.detach() - swap_order(weight)
    torch.optim.SGD([weight], lr=1.0, fused=True).step()


def step_adam(model):
    weight = weight_of(model)
    weight.grad = weight.detach() - swap_order(weight)
    torch.optim.Adam(model.parameters(), lr=0.3, fused=True).step()


def copy_data(model):
    weight_of(model).data.copy_(swap_order(weight_of(model)))


def copy_average_in(model):
    """As libraries for moving averages do, see also :func:`step_adam` for whoever trains in evaluation mode."""
    for parameter in model.parameters():
        average = swap_order(parameter)
        parameter.data.copy_(average.data)


def write_by_numpy(model):
    weight_of(model).detach().numpy()[:] = swap_order(weight_of(model)).numpy()


RECORDED = [
    change_in_place,
    change_storage,
    replace_object,
    replace_object_on_the_same_storage,
    change_by_vector,
    change_dtype,
]
UNRECORDED = [step_fused, step_adam, copy_data, copy_average_in, write_by_numpy]


@every_kind
@pytest.mark.parametrize("change", [*RECORDED, *UNRECORDED])
def test_anew_in_evaluation_after_a_change_of(make, change):
    model = make().eval()
    model(input_of(model))
    change(model)
    assert choices(model, lambda: model(input_of(model))) == {(0, 1)}
    assert_edges_fit_weights(model, make)
    assert choices(model, lambda: model(input_of(model))) == set()


@pytest.mark.parametrize("change", [*UNRECORDED, NeuralGraph.reset_parameters])
def test_anew_in_evaluation_after_a_change_of_a_large_graph(change):
    def make(wiring):
        return NeuralGraph((3, 60, 60, 2), 40, wiring=wiring)

    graph = make(CountingDNW()).eval()
    graph(MAPS)
    change(graph)
    assert choices(graph, lambda: graph(MAPS)) == {(0, 1)}
    assert_edges_fit_weights(graph, make)


@every_kind
@pytest.mark.parametrize("change", [step_fused, copy_data])
def test_changes_that_leave_no_trace_are_seen_in_training_and_at_the_switch(make, change):
    model = make()
    model(input_of(model))
    for mode in (True, False):
        change(model)
        model.train(mode)
        assert_edges_fit_weights(model, make)


@every_kind
@pytest.mark.parametrize("train", [False, True])
def test_anew_with_weights_passed_by_functional_call(make, train):
    model = make().train(train)
    usual = model(input_of(model))
    name = next(name for name, each in model.named_parameters() if each is weight_of(model))
    other = {name: swap_order(weight_of(model))}
    changed = functional_call(model, other, (input_of(model),))
    reference = copy.deepcopy(model)
    reference.load_state_dict(other, strict=False)
    assert torch.equal(changed, reference(input_of(model)))
    assert torch.equal(model(input_of(model)), usual)


@every_kind
def test_copies_have_a_wiring_of_their_own(make):
    model = make().eval()
    x = input_of(model)
    expected = model(x)
    twin = copy.deepcopy(nn.Sequential(model))[0]
    assert torch.equal(twin(x), expected)
    change_in_place(twin)
    assert_edges_fit_weights(twin, make)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), expected)
    assert choices(model, lambda: model(x)) == set()
    assert torch.equal(model(x), expected)


def test_a_pickled_graph_has_a_wiring_of_its_own():
    graph = make_graph().eval()
    twin = pickle.loads(pickle.dumps(graph))
    assert torch.equal(twin(MAPS), graph(MAPS))
    change_in_place(twin)
    assert_edges_fit_weights(twin, make_graph)
    assert choices(graph, lambda: graph(MAPS)) == set()


def test_anew_when_a_new_storage_takes_the_place_of_the_old_one():
    graph = NeuralGraph((20, 50), 100, wiring=CountingDNW(), input_function=False).eval()
    weight, x = graph.candidates.weight, torch.zeros(1, 20)
    for _ in range(30):  # the allocator offers the freed place in about every third round
        graph(x)
        place, other = weight.data_ptr(), torch.rand(1000)
        weight.data = torch.zeros(1000)
        copies = [other.clone() for _ in range(50)]
        weight.data = next((copy for copy in copies if copy.data_ptr() == place), other)
        assert choices(graph, lambda: graph(x)) == {(0, 1)}


def test_anew_with_weights_made_in_inference_mode():
    graph = make_graph().eval()
    expected = graph(MAPS)
    with torch.inference_mode():
        twin = copy.deepcopy(graph)
        assert torch.equal(twin(MAPS), expected)
        change_in_place(twin)  # leaves no trace: such tensors keep no version
        assert_edges_fit_weights(twin, make_graph)


@pytest.mark.parametrize("place", [0, 7, 46])
def test_a_small_graph_is_compared_whole(place):
    graph = NeuralGraph((3, 5, 4), 11, wiring=CountingDNW()).eval()
    graph(MAPS)
    graph.candidates.weight.data[place] += 10
    assert graph.real_index.tolist() == top_k(graph.candidates.weight.tolist(), 11)


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
    graph(MAPS)
    before = graph.num_real_edges
    for parameter in graph.wiring.parameters():
        parameter.data.add_(1)
    kept = graph.candidates.weight.abs() > graph.wiring.threshold.sigmoid()
    assert graph.num_real_edges == int(kept.sum()) < before


def test_a_graph_that_has_run_is_saved_like_one_that_has_not():
    graph = make_graph("dnw").eval()
    size = len(pickle.dumps(graph))
    graph(MAPS)
    assert len(pickle.dumps(graph)) == size


def test_a_wiring_object_serves_several_graphs():
    wiring = CountingDNW()
    first, second = make_graph(wiring), make_graph(wiring)
    first(MAPS)
    assert [each.training_calls for each in (first.wiring, second.wiring, wiring)] == [1, 0, 0]
