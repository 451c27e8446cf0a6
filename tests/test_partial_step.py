"""Steps on the trained weights alone, beside steps on all after which the others are set back."""

import copy

import pytest
import torch
from torch import nn

from dnw_graph import attach, partial_step
from dnw_graph.sparse_layers import sparsify
from dnw_graph.wirings import SET, RigL

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.5, centered=True),
}


def train(model, make, closure, steps=9):
    """Some steps; the weights and all states in the order of the parameters."""
    optimizer = make(model.parameters())
    attach(model, optimizer, 100, steps_per_epoch=2)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = torch.randn(8, 24, generator=generator), torch.randint(12, (8,), generator=generator)

        def loss(x=x, y=y):
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(model(x), y)
            value.backward()
            return value

        if closure:
            assert optimizer.step(loss) is not None
        else:
            loss()
            optimizer.step()
        assert optimizer.param_groups[0]["params"] == parameters
        assert set(optimizer.state) <= set(parameters)
    states = [value for each in parameters for _, value in sorted(optimizer.state.get(each, {}).items())]
    return [*(each.detach() for each in parameters), *(each for each in states if isinstance(each, torch.Tensor))]


@pytest.fixture
def count(monkeypatch):
    """How often a step was one on vectors."""
    calls, begin = [], partial_step.PartialStep.begin
    monkeypatch.setattr(partial_step.PartialStep, "begin", lambda self: (calls.append(1), begin(self)))
    return calls


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_equals_steps_on_all(name, closure, distribution, count, monkeypatch):
    rule = RigL(every=3, until=50) if closure else SET(every=3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 12))
    sparsify(model, 0.2, rule, distribution=distribution)
    other = copy.deepcopy(model)
    found = train(model, OPTIMIZERS[name], closure)
    alone = len(count)
    if distribution == "uniform":  # otherwise one layer may come to have more than a quarter of its weights
        assert alone == 9
    assert alone
    monkeypatch.setattr(partial_step, "ELEMENTWISE", ())
    expected = train(other, OPTIMIZERS[name], closure)
    assert len(count) == alone
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert torch.equal(a == 0, b == 0)


def interrupted(*_):
    raise KeyboardInterrupt


def test_after_an_error_the_optimizer_has_its_parameters(count):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40))
    sparsify(model, 0.2, SET(every=3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach(model, optimizer, 100)
    parameters = list(model.parameters())

    model(torch.ones(2, 24)).sum().backward()
    handle = optimizer.register_step_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    assert optimizer.param_groups[0]["params"] == parameters
    assert optimizer.state_dict()["param_groups"][0]["params"] == [0, 1]
    before = [each.detach().clone() for each in parameters]
    optimizer.step()
    assert optimizer.param_groups[0]["params"] == parameters
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_gradients_can_be_reset_after_an_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40))
    sparsify(model, 0.2, SET(every=30))
    found = []
    for fails in (False, True):
        each = copy.deepcopy(model)
        optimizer = torch.optim.Adam(each.parameters(), 0.1)
        attach(each, optimizer, 100)
        if fails:
            each(torch.ones(2, 24)).sum().backward()
            with optimizer.register_step_pre_hook(interrupted), pytest.raises(KeyboardInterrupt):
                optimizer.step()
        optimizer.zero_grad()
        each(torch.ones(2, 24)).square().sum().backward()
        optimizer.step()
        found.append(list(each.parameters()))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_memory_format_is_continued():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    sparsify(model, 0.1, SET(every=30))
    before = copy.deepcopy(model).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(before.parameters(), 0.1)
    attach(before, optimizer, 100)
    x = torch.randn(2, 8, 5, 5)
    before(x).sum().backward()
    optimizer.step()
    state, states = copy.deepcopy(before.state_dict()), []
    for each in (before, model):
        each.load_state_dict(state)
        other = torch.optim.Adam(each.parameters(), 0.1)
        attach(each, other, 100)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        each.zero_grad()
        each(x).square().sum().backward()
        other.step()
        states.append([*each.parameters(), *(state["exp_avg"] for state in other.state.values())])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)


def test_other_optimizers_step_on_all(count):
    model = nn.Sequential(nn.Linear(24, 40))
    sparsify(model, 0.2, SET(every=3))
    train_with = torch.optim.Adagrad(model.parameters())
    attach(model, train_with, 100)
    model(torch.ones(2, 24)).sum().backward()
    train_with.step()
    assert not count
