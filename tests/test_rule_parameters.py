"""Parameters that rules own reach the optimiser, with their own weight decay, in any order of creation."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Rprop
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from dnw_graph import STR, InputError, NeuralGraph, RigL, attach, sparsify
from dnw_graph.sparse_layers import weight_graphs

X = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OWN = 0.5
OPTIMISERS = {
    "sgd": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    "adam": lambda p: Adam(p, 0.01, weight_decay=0.05),
    "decoupled": lambda p: AdamW(p, 0.01, weight_decay=0.05),
    "fused": lambda p: AdamW(p, 0.01, weight_decay=0.05, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01, weight_decay=0.05),
}


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def sparse(decay=OWN):
    model = dense()
    sparsify(model, wiring=STR(-2.0, decay))
    return model


def thresholds(model):
    return [graph.wiring.threshold for graph in weight_graphs(model).values()]


def unguarded(model):
    """The same model, which trains without ``attach``."""
    for graph in weight_graphs(model).values():
        graph._needs_attach = False
    return model


def others(model):
    return [each for each in model.parameters() if each.dim()]


def step(model, optimiser):
    optimiser.zero_grad()
    model(X).square().sum().backward()
    optimiser.step()


def same(model, twin):
    pairs = zip(others(model) + thresholds(model), others(twin) + thresholds(twin), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_a_step_is_that_of_an_optimiser_with_a_group_for_them(make):
    model, twin = sparse(), unguarded(sparse())
    own = make(model.parameters())
    other = make([{"params": others(twin)}, {"params": thresholds(twin), "weight_decay": OWN}])
    attach(model, own)
    attach(model, own)
    for _ in range(5):
        step(model, own)
        step(twin, other)
    assert same(model, twin)
    assert all(abs(each.item() + 2) > 1e-3 for each in thresholds(model))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("by", ["sparsify", "rewire"])
def test_those_that_an_older_optimiser_lacks_are_added_with_their_names(by, named):
    model, twin = dense(), sparse()
    if by == "rewire":
        sparsify(model, 0.5)
    own = SGD(model.named_parameters() if named else model.parameters(), 0.1, momentum=0.9, weight_decay=0.05)
    other = SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=0.05)
    if by == "rewire":
        for graph in weight_graphs(model).values():
            graph.rewire(STR(-2.0, OWN), graph.num_candidates)
    else:
        sparsify(model, wiring=STR(-2.0, OWN))
    for each, optimiser in ((model, own), (twin, other)):
        attach(each, optimiser)
        attach(each, optimiser)
        for _ in range(3):
            step(each, optimiser)
    assert same(model, twin)
    (group,) = own.param_groups
    assert {*group["params"]} == {*model.parameters()}
    if named:
        found = dict(zip(group["param_names"], group["params"], strict=True))
        assert all(found[name] is each for name, each in model.named_parameters() if not each.dim())


def test_groups_of_the_optimiser_stay_as_they_were_created():
    model = sparse()
    own = SGD(model.named_parameters(), 0.1, momentum=0.9, weight_decay=0.05)
    groups = copy.deepcopy(own.state_dict()["param_groups"])
    attach(model, own)
    assert own.state_dict()["param_groups"] == groups
    step(model, own)
    assert own.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("where", ["closure", "step"])
def test_a_step_that_failed_does_not_change_the_next_one(where):
    class Failing(SGD):
        @torch.no_grad()
        def step(self, closure=None):
            if closure is not None:
                closure()
            if fails and where == "step":
                raise RuntimeError
            return super().step()

    model, twin = sparse(), sparse()
    own, other = (Failing(each.parameters(), 0.1, weight_decay=0.05) for each in (model, twin))

    def closure():
        if where == "closure":
            raise RuntimeError

    attach(model, own)
    attach(twin, other)
    fails = True
    with pytest.raises(RuntimeError):
        own.step(closure)
    if where == "closure":
        assert len(own.param_groups) == 1
    fails = False
    for each, optimiser in ((model, own), (twin, other)):
        step(each, optimiser)
        assert len(optimiser.param_groups) == 1
    assert same(model, twin)


@pytest.mark.parametrize(
    ("make", "advance"),
    [
        (lambda o: LambdaLR(o, lambda number: 0.5**number), ()),
        (lambda o: OneCycleLR(o, 0.1, total_steps=9), ()),
        (lambda o: ReduceLROnPlateau(o, patience=0, min_lr=[0.001]), (1.0,)),
    ],
    ids=["lambda", "one_cycle", "plateau"],
)
def test_a_scheduler_may_exist_before(make, advance):
    models = []
    for first in ("scheduler", "attach"):
        model = sparse()
        models.append(model)
        own = SGD(model.parameters(), 0.1, momentum=0.9)
        if first == "attach":
            attach(model, own)
        scheduler = make(own)
        if first == "scheduler":
            attach(model, own)
        for _ in range(4):
            step(model, own)
            scheduler.step(*advance)
    assert same(*models)


def matrices(parameters):
    return torch.optim.Muon([each for each in parameters if each.dim() == 2], 0.02)


REFUSED = {
    "LBFGS": (torch.optim.LBFGS, OWN, "LBFGS takes many steps in one but calls its hooks once"),
    "capturable": (lambda p: Adam(p, capturable=True), OWN, r"Adam\(capturable=True\) is for steps in a CUDA graph"),
    "Rprop": (Rprop, OWN, r"Rprop has no weight decay, but 0\..*threshold needs 0.5: give STR weight_decay=0, or use"),
    "Adagrad": (lambda p: Adagrad(p[:4]), OWN, r"Adagrad was created without 0\..*threshold and cannot add it: create"),
    "Muon": (matrices, OWN, r"Muon was created without 0\..*threshold .* another optimiser and attach that one"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_step_them_is_refused_by_name_and_stays_the_same(kind):
    make, decay, message = REFUSED[kind]
    if kind == "Muon" and not hasattr(torch.optim, kind):
        pytest.skip(f"PyTorch {torch.__version__} has no {kind}")
    model = sparse(decay)
    own = make(others(model) + thresholds(model))
    groups = [dict(group, params=list(group["params"])) for group in own.param_groups]
    with pytest.raises(InputError, match=message) as error:
        attach(model, own)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    for group, before in zip(own.param_groups, groups, strict=True):
        assert [*map(id, group["params"])] == [*map(id, before["params"])]


def test_an_optimiser_without_decay_steps_those_that_need_none():
    model, twin = sparse(0.0), unguarded(sparse(0.0))
    own, other = Rprop(model.parameters()), Rprop(twin.parameters())
    attach(model, own)
    for _ in range(3):
        step(model, own)
        step(twin, other)
    assert same(model, twin)
    assert "weight_decay" not in own.param_groups[0]


def test_frozen_ones_and_those_of_other_models_are_not_added():
    model, other = sparse(), sparse()
    for each in thresholds(model):
        each.requires_grad_(False)
    own = SGD(others(model), 0.1)
    attach(nn.ModuleList([model, other]), own)
    assert own.param_groups[0]["params"] == others(model)


def test_after_an_error_the_optimiser_is_saved_with_the_groups_that_it_was_created_with():
    model = sparse()
    optimiser = OPTIMISERS["sgd"](model.parameters())
    attach(model, optimiser)
    groups = [group["params"] for group in optimiser.state_dict()["param_groups"]]

    def interrupted(*_):
        raise KeyboardInterrupt

    with optimiser.register_step_pre_hook(interrupted), pytest.raises(KeyboardInterrupt):
        step(model, optimiser)
    assert [group["params"] for group in optimiser.state_dict()["param_groups"]] == groups
    step(model, optimiser)


WITHOUT = r"STR has parameters of its own, but no attached optimiser has them: call dnw_graph\.attach"


@pytest.mark.parametrize("first", ["optimiser", "sparsify"])
def test_without_attach_the_second_backward_pass_raises(first):
    model = dense()
    if first == "sparsify":
        sparsify(model, wiring=STR(-2.0, OWN))
    own = SGD(model.parameters(), 0.1)
    if first == "optimiser":
        sparsify(model, wiring=STR(-2.0, OWN))
    step(model, own)
    with pytest.raises(InputError, match=WITHOUT):
        step(model, own)
    attach(model, own)
    before = [each.item() for each in thresholds(model)]
    step(model, own)
    assert all(each.item() != old for each, old in zip(thresholds(model), before, strict=True))


def test_a_rule_with_parameters_that_follows_an_attached_one_is_attached_anew():
    model = NeuralGraph((6, 5, 3), 9, wiring=RigL(every=2, until=9), node_function=nn.Tanh()).double()
    own = SGD(model.parameters(), 0.1)
    attach(model, own)
    step(model, own)
    model.rewire(STR(-3.0, OWN), 9)
    step(model, own)
    with pytest.raises(InputError, match=WITHOUT):
        step(model, own)
    attach(model, own)
    step(model, own)
    assert model.wiring.threshold.item() != -3
    model.load_weights(torch.randn(model.num_candidates, dtype=torch.float64))  # the same parameter
    for _ in range(3):
        step(model, own)
    assert model.wiring.threshold.item() != -3


@pytest.mark.filterwarnings("ignore:.* left the ranking of all layers")
def test_a_layer_that_leaves_a_ranking_has_a_threshold_that_is_not_attached():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).double()
    sparsify(model, wiring=STR(-2.0, OWN), distribution="global")
    own = SGD(model.parameters(), 0.1)
    attach(model, own)
    old = model[1]
    model[1] = nn.Linear(6, 3).double()
    for _ in range(3):
        step(model, own)
    old(X).sum().backward()
    with pytest.raises(InputError, match=WITHOUT):
        old(X).sum().backward()


def test_where_weights_and_thresholds_have_two_optimisers_that_of_the_thresholds_is_attached():
    model, twin = sparse(), sparse()
    own = SGD(thresholds(model), 0.1), SGD(others(model), 0.1, weight_decay=0.05)
    both = SGD([{"params": others(twin), "weight_decay": 0.05}, {"params": thresholds(twin)}], 0.1)
    attach(model, own[0])
    attach(twin, both)
    for _ in range(3):
        model.zero_grad()
        model(X).square().sum().backward()
        for each in own:
            each.step()
        step(twin, both)
    assert same(model, twin)


def test_an_optimiser_without_thresholds_is_refused_after_one_that_has_them():
    model = sparse()
    attach(model, SGD(model.parameters(), 0.1))
    own, older = SGD(model.parameters(), 0.1), SGD(others(model), 0.1)
    attach(model, own)
    step(model, own)
    with pytest.raises(InputError, match=r"SGD has moved the weights of 0\.weight, but another optimiser is attached"):
        step(model, older)


def test_optimisers_of_other_models_are_not_refused():
    model = sparse()
    other = nn.Linear(2, 2)
    attach(nn.ModuleList([model, other]), torch.optim.LBFGS(other.parameters()))
