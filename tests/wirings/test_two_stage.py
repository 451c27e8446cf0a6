"""Lottery Ticket and Fine Tune for whole models."""

import copy

import numpy as np
import pytest
import torch
from pairs import rest_is_slow
from torch import nn

from dnw_graph import InputError, NeuralGraph
from dnw_graph.models import MobileNetV1DNW
from dnw_graph.wirings.two_stage import fine_tune, lottery_ticket


class Small(nn.Module):
    """A stem with a norm, two graphs and a classifier: parameters and buffers of every kind."""

    def __init__(self, k=(9, 5)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.first = NeuralGraph((3, 4, 2), k[0], wiring="complete", name="first")
        self.second = NeuralGraph((2, 3, 3), k[1], wiring="complete", name="second")
        self.classifier = nn.Linear(3, 4)

    def forward(self, x):
        return self.classifier(self.second(self.first(self.stem(x))).mean((2, 3)))


def train(model, steps=3):
    """Train on random images; return the state before and after."""
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
        optimiser.step()
    return before, copy.deepcopy(model.state_dict())


def strongest(magnitude, k):
    """The k largest |w|, ties to the lower index, ascending, by a stable sort of them all."""
    return np.sort(np.argsort(-magnitude.numpy(), kind="stable")[:k])


def graphs_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, NeuralGraph)}


def assert_state(model, expected):
    """Every parameter and buffer but the edges is the expected one."""
    state = {
        key: value
        for key, value in model.state_dict().items()
        if not key.endswith(("wiring.index", "wiring.checksum", "rule"))
    }
    expected = {key: value for key, value in expected.items() if not key.endswith("rule")}
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


@pytest.mark.parametrize(
    "make",
    rest_is_slow([Small, lambda: MobileNetV1DNW(0.225, num_classes=4, stem_stride=1, small=True, wiring="complete")]),
)
def test_edges_are_the_strongest_after_training_and_weights_those_of_the_rule(make):
    complete = make()
    initial, trained = train(complete, 2)
    assert any(not torch.equal(initial[key], value) for key, value in trained.items())
    for model, start in ((fine_tune(complete), trained), (lottery_ticket(complete, initial), initial)):
        assert type(model) is type(complete)
        assert_state(model, start)
        for name, graph in graphs_of(model).items():
            expected = strongest(trained[f"{name}.candidates.weight"].abs(), graph.num_edges)
            assert np.array_equal(graph.real_index.numpy(), expected)
            assert graph.num_edges == graphs_of(complete)[name].num_edges < graph.num_candidates
    # The first stage is left as it was.
    assert_state(complete, trained)
    assert all(graph.num_real_edges == graph.num_candidates for graph in graphs_of(complete).values())


@pytest.mark.parametrize("stage", ["fine_tune", "lottery_ticket"])
def test_the_second_stage_trains_apart_from_the_first(stage):
    complete = Small()
    initial, trained = train(complete)
    model = fine_tune(complete) if stage == "fine_tune" else lottery_ticket(complete, initial)
    edges = {name: graph.real_index.clone() for name, graph in graphs_of(model).items()}
    kept = copy.deepcopy(initial)
    start = {name: graph.candidates.weight.detach().clone() for name, graph in graphs_of(model).items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.rand(4, 3, 8, 8)).square().mean().backward()
        optimiser.step()
    for name, graph in graphs_of(model).items():
        assert torch.equal(graph.real_index, edges[name])
        moved = (graph.candidates.weight.detach() != start[name]).nonzero().flatten()
        assert moved.numel()
        assert set(moved.tolist()) <= set(edges[name].tolist())
    assert_state(complete, trained)
    assert all(torch.equal(value, kept[key]) for key, value in initial.items())


def test_modes_are_kept():
    complete = Small()
    initial, _ = train(complete)
    for mode in (True, False):
        complete.train(mode)
        for model in (fine_tune(complete), lottery_ticket(complete, initial)):
            assert all(module.training is mode for module in model.modules())


def test_the_pruned_model_computes_with_its_edges_alone():
    complete = Small().eval()
    model = fine_tune(complete)
    x = torch.rand(2, 3, 8, 8)
    for graph in graphs_of(complete).values():
        gone = np.setdiff1d(
            np.arange(graph.num_candidates), strongest(graph.candidates.weight.detach().abs(), graph.num_edges)
        )
        graph.candidates.weight.data[gone] = 0
    torch.testing.assert_close(model(x), complete(x))


def test_the_wiring_decides_how_many_edges_another_model_of_the_first_stage_keeps():
    # k has no part in the training of a complete graph: it may be chosen afterwards.
    complete = Small()
    train(complete)
    other = Small(k=(3, 11))
    other.load_state_dict(complete.state_dict())
    for name, graph in graphs_of(fine_tune(other)).items():
        expected = strongest(graph.candidates.weight.detach().abs(), {"first": 3, "second": 11}[name])
        assert np.array_equal(graph.real_index.numpy(), expected)


@pytest.mark.parametrize("apply", [fine_tune, lambda model: lottery_ticket(model, model.state_dict())])
def test_a_model_without_a_graph_is_refused(apply):
    with pytest.raises(
        InputError, match="a Linear has no neural graph and no sparse weight, so there is no wiring to keep"
    ):
        apply(nn.Linear(3, 4))


def test_the_initial_state_of_another_model_is_refused():
    complete = Small()
    initial, trained = train(complete)
    without = {key: value for key, value in initial.items() if key != "stem.0.bias"}
    other = {**initial, "classifier.weight": torch.zeros(5, 3)}
    for state in (without, other, {}):
        with pytest.raises(InputError, match="the initial state is not of this model") as error:
            lottery_ticket(complete, state)
        assert "\n" not in str(error.value)
    assert_state(complete, trained)
