"""Node functions that the backward pass computes again: the same numbers, with less kept."""

import copy

import pytest
import torch
from torch import nn

from dnw_graph import Continuous, Discrete, InputError, NeuralGraph
from dnw_graph.analysis.cost import neural_graphs
from dnw_graph.models import create_model
from dnw_graph.propagation import PROPAGATIONS
from dnw_graph.training import RunOptions, read_checkpoint
from dnw_graph.training.runs import run

DYNAMIC = {"num_nodes": 14, "num_inputs": 3, "num_outputs": 4}
GRAPHS = {
    "static": {"blocks": (3, 5, 4, 2)},
    "discrete": DYNAMIC | {"dynamics": Discrete(3), "stride": 2},
    "send": DYNAMIC | {"dynamics": Discrete(3), "node_function": "relu_conv_send_norm"},
    "continuous": DYNAMIC | {"dynamics": Continuous("rk4", options={"step_size": 0.5})},
    "adjoint": DYNAMIC | {"dynamics": Continuous("rk4", options={"step_size": 0.5}, adjoint=True)},
}


def twins(**options):
    """Two equal graphs, the second of which computes its node functions again."""
    graphs = []
    for recompute in (False, True):
        torch.manual_seed(1)
        graphs.append(NeuralGraph(num_edges=20, recompute=recompute, **options))
    return graphs


def train(model, x, steps=3):
    """All numbers of some steps of training, and the state after them."""
    torch.manual_seed(2)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    numbers = []
    for _ in range(steps):
        optimiser.zero_grad()
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        out.square().mean().backward()
        numbers += [out.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())]
        optimiser.step()
    return numbers + [tensor.clone() for tensor in model.state_dict().values()]


def assert_bits(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("propagation", sorted(PROPAGATIONS))
@pytest.mark.parametrize("graph", GRAPHS)
def test_same_bits(graph, propagation):
    x = torch.randn(4, 3, 6, 5)
    plain, again = twins(propagation=propagation, **GRAPHS[graph])
    assert_bits(train(again, x), train(plain, x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_updated_once(momentum):
    plain, again = twins(blocks=(3, 5, 4, 2))
    x = torch.randn(4, 3, 6, 5)
    for graph in (plain, again):
        for norm in graph.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum
        train(graph, x)
    assert {int(b) for name, b in again.named_buffers() if name.endswith("num_batches_tracked")} == {3}
    assert_bits(list(again.buffers()), list(plain.buffers()))


class Stateful(nn.Module):
    """What it gives depends on chance and on a buffer that every call changes."""

    def __init__(self, num_nodes):
        super().__init__()
        self.conv = nn.Conv2d(num_nodes, num_nodes, 3, padding=1, groups=num_nodes)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("unused", None)
        self.chosen = 0

    def forward(self, z):
        self.chosen += 1
        self.calls += 1
        return self.dropout(self.conv(z).tanh()) * self.calls.sqrt()


def test_chance_and_state_of_a_node_function_are_those_of_the_forward_pass():
    plain, again = twins(blocks=(3, 5, 4, 2), node_function=Stateful)
    x = torch.randn(4, 3, 6, 5)
    assert_bits(train(again, x), train(plain, x))
    for graph, calls in ((plain, 3), (again, 6)):
        for function in list(graph.dynamics.node_functions)[:-1]:
            assert (function.chosen, int(function.calls)) == (calls, 3)


def test_backward_passes_can_be_repeated():
    _, graph = twins(blocks=(3, 5, 4, 2), node_function=Stateful)
    loss = graph(torch.randn(4, 3, 6, 5)).square().mean()
    leaves = list(graph.parameters())
    assert_bits(torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(loss, leaves))


def test_edges_are_chosen_once(monkeypatch):
    _, graph = twins(blocks=(3, 5, 4, 2))
    choose, calls = graph.wiring.choose_to_train, []
    monkeypatch.setattr(graph.wiring, "choose_to_train", lambda *args: calls.append(1) or choose(*args))
    graph(torch.randn(4, 3, 6, 5)).sum().backward()
    assert len(calls) == 1


def test_nothing_is_computed_again_without_gradients():
    _, graph = twins(blocks=(3, 5, 4, 2), node_function=Stateful)
    with torch.no_grad():
        graph(torch.randn(4, 3, 6, 5))
    assert [function.chosen for function in list(graph.dynamics.node_functions)[:-1]] == [1, 1, 1]


def kept_bytes(model, x):
    """Bytes kept for the backward pass beside parameters and buffers, each piece of memory counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    for tensor in (*model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


# Those that ReLU and the second norm and ReLU keep.
@pytest.mark.parametrize(("function", "inner_maps"), [("norm_relu_conv", 1), ("norm_relu_conv_norm_relu", 3)])
def test_inner_maps_are_not_kept(function, inner_maps):
    x = torch.randn(4, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    graphs = twins(blocks=(3, 5, 4, 2), node_function=function, propagation="block")
    plain, again = (kept_bytes(graph, x) for graph in graphs)
    maps = (3 + 5 + 4) * 4 * (4 * 20 * 20)  # of all nodes with a node function
    assert plain - again >= inner_maps * maps
    # What the nodes receive, their states, and the dense weights.
    assert again == 2 * maps + 4 * graphs[1].num_candidates


def test_state_dicts_know_nothing_of_it():
    plain, again = twins(blocks=(3, 5, 4, 2))
    assert list(plain.state_dict()) == list(again.state_dict())
    train(plain, torch.randn(4, 3, 6, 5))
    again.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 6, 5)
    assert_bits(train(copy.deepcopy(again), x), train(plain, x))


@pytest.mark.parametrize("name", ["mobilenet_v1_dnw", "tiny_classifier"])
def test_models_pass_it_on(name):
    for recompute in (False, True):
        graphs = neural_graphs(create_model(name, recompute=recompute)).values()
        assert {each.dynamics.recompute for each in graphs} == {recompute}


class Small(nn.Sequential):
    def __init__(self, num_classes, image_size):
        graph = NeuralGraph((8, 16, 16), 100, propagation="block")
        head = nn.Linear(16, num_classes)
        super().__init__(nn.Conv2d(3, 8, 3, 4), graph, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


@pytest.mark.slow
def test_a_run_and_its_checkpoints_are_the_same_with_and_without(tmp_path):
    options = {"epochs": 2, "batch_size": 720, "accelerator": "cpu", "workers": 0}
    states = []
    for recompute in (False, True):
        folder = str(tmp_path / str(recompute))
        run(Small, {}, RunOptions(output=folder, recompute=recompute, **options))
        states.append(read_checkpoint(f"{folder}/last.ckpt")["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert_bits(states[0].values(), states[1].values())
    first = str(tmp_path / "False" / "last.ckpt")
    run(Small, {}, RunOptions(resume=first, recompute=True, **options))
    run(Small, {}, RunOptions(evaluate=first, recompute=True, **options))


def test_a_run_of_a_model_without_graphs_refuses_it():
    def create(num_classes, image_size):
        return create_model("mobilenet_v1", num_classes=num_classes)

    with pytest.raises(InputError, match=r"^--recompute is for models with neural graphs"):
        run(create, {}, RunOptions(recompute=True, accelerator="cpu"))
