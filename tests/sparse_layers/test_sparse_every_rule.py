"""Sparse layers with every rule of the package, and with a user's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from step_loops import attached
from torch import nn

from dnw_graph import DNW, L1Anneal, Schedule, TargetedDropout, Wiring, attach
from dnw_graph.sparse_layers import sparsify, weight_graphs
from dnw_graph.wirings import WIRINGS, FineTune, LotteryTicket

X = torch.rand(32, 6, generator=torch.Generator().manual_seed(1))
Y = (X.sum(1) > 3).long()


class StrongestPositive(Wiring):
    def choose(self, view):
        return view.weight.topk(view.k).indices.sort().values


def make_model():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def train(model, steps=6):
    optimiser = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    attach(model, optimiser, steps, steps_per_epoch=2)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimiser.step()


def real(model):
    return [model[i].weight.ne(0) for i in (0, 2)]


FIRST_STAGE = [name for name in WIRINGS if name not in ("fine_tune", "lottery_ticket")]
RULES = {
    **{name: name for name in FIRST_STAGE},
    "l1_anneal": "l1_anneal",
    "targeted_dropout": TargetedDropout(0.5),
    "own": StrongestPositive(),
}


@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.parametrize("name", RULES)
def test_trains_and_ends_with_its_edges(name, distribution):
    model = make_model()
    sparsify(model, None if name == "nm" else 0.25, RULES[name], distribution=distribution)
    train(model)
    model.eval()
    expected = {"complete": 64, "str": 64, "nm": 40}.get(name, 16)
    assert sum(graph.num_real_edges for graph in weight_graphs(model).values()) == expected
    if name != "set":  # whose grown weights are zero at first
        assert sum(int(mask.sum()) for mask in real(model)) == expected
    assert all(graph.num_real_edges == len(graph.real_index) for graph in weight_graphs(model).values())


@pytest.mark.parametrize("name", RULES)
def test_the_gradient_goes_to_all_weights_or_to_the_real_ones(name):
    model = make_model()
    sparsify(model, None if name == "nm" else 0.25, RULES[name])
    attached(model, 6, steps_per_epoch=2)
    seen = {}
    model[0].register_forward_hook(lambda layer, *_: seen.update(mask=layer.weight.ne(0)))
    model(X).square().sum().backward()
    rule = weight_graphs(model)["0.weight"].wiring
    gradient = model[0].parametrizations.weight.original.grad.ne(0)
    dead = ~model[2].weight.ne(0).any(0)  # hidden units that nothing reads have no gradient
    expected = torch.ones_like(gradient) if (rule.gradient or rule.trained) != "real" else seen["mask"]
    if (rule.gradient or rule.trained) == "all" or name == "random_graph":
        assert torch.equal(gradient[~dead], expected[~dead] & (model[0](X) > 0).any(0)[~dead, None])
    assert not (gradient & ~expected).any()


def test_a_rule_for_training_is_asked_once_per_forward_pass():
    model = make_model()
    sparsify(model, 0.25, L1Anneal(removal=Schedule(0.0, 1.0, 0, 4)))
    step = attached(model)
    kept = []
    for _ in range(5):
        model(X)
        kept.append(weight_graphs(model)["0.weight"].num_real_edges)
        step()
    assert kept == [48, 39, 30, 21, 12]  # of 48 down to 12 in four steps
    assert int(weight_graphs(model)["0.weight"].wiring.step) == 5


def test_the_masks_of_targeted_dropout_are_those_of_seed_and_step():
    model = make_model()
    sparsify(model, 0.25, TargetedDropout(0.5))
    twin = copy.deepcopy(model)
    step = attached(model)
    attached(twin)
    first = model(X)
    assert torch.equal(first, twin(X))
    assert torch.equal(first, model(X))
    step()
    assert not torch.equal(first, model(X))


def test_random_graph_keeps_its_edges():
    model = make_model()
    sparsify(model, 0.25, "random_graph")
    before = real(model)
    train(model)
    assert all(torch.equal(a, b) for a, b in zip(before, real(model), strict=True))


def test_the_penalty_is_that_of_the_real_weights():
    model = make_model()
    sparsify(model, 0.25, L1Anneal(0.5, Schedule(0.0, 0.0)))
    model(X)
    graph = weight_graphs(model)["0.weight"]
    graph.penalty().backward()
    original = model[0].parametrizations.weight.original
    assert torch.allclose(graph.penalty(), 0.5 * model[0].weight.abs().sum())
    assert torch.equal(original.grad, 0.5 * model[0].weight.sign())


@pytest.mark.parametrize("rule", [FineTune, LotteryTicket])
def test_second_stage(rule):
    model = make_model()
    sparsify(model, 0.25, "complete")
    initial = copy.deepcopy(model.state_dict())
    train(model)
    trained = [model[i].weight.detach().clone() for i in (0, 2)]
    if rule is LotteryTicket:
        model.load_state_dict(initial)
    for i, weight in zip((0, 2), trained, strict=True):
        graph = weight_graphs(model)[f"{i}.weight"]
        start = graph.candidate_weight.detach()
        graph.rewire(FineTune(weight.flatten()) if rule is FineTune else LotteryTicket(weight.flatten(), start), 4)
        threshold = weight.abs().flatten().sort(descending=True).values[3]
        origin = weight if rule is FineTune else initial[f"{i}.parametrizations.weight.original"]
        assert torch.equal(model[i].weight, origin * (weight.abs() >= threshold))
    before = real(model)
    train(model)
    assert all(torch.equal(a, b) for a, b in zip(before, real(model), strict=True))


def test_a_rule_that_brings_its_weights():
    layer = nn.Linear(3, 2)
    trained, initial = torch.tensor([1.0, -6, 2, 5, 3, -4]), torch.tensor([7.0, 8, 9, 10, 11, 12])
    sparsify(layer, 0.5, LotteryTicket(trained, initial))
    assert layer.weight.tolist() == [[0, 8, 0], [10, 0, 12]]
    assert layer.parametrizations.weight.original.flatten().tolist() == initial.tolist()


def test_a_rule_object_is_copied_for_every_weight():
    rule = DNW()
    model = make_model()
    sparsify(model, 0.25, rule)
    rules = [graph.wiring for graph in weight_graphs(model).values()]
    assert len({id(each) for each in (*rules, rule)}) == 3
