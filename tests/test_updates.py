"""attach: what a rule sees after a step, what it may change, and what is refused."""

import copy
import gc
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from dnw_graph import (
    ACDC,
    GMP,
    SET,
    STR,
    InputError,
    NeuralGraph,
    RigL,
    Schedule,
    SparseMomentum,
    TargetedDropout,
    Wiring,
    attach,
    partial_step,
    updates,
)
from dnw_graph.sparse_layers import densify, sparsify, weight_graphs
from dnw_graph.wirings.prune_and_grow import PruneAndGrow

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Probing(Wiring):
    """Trains the first half of the candidates; asks for all gradients before every third step."""

    trained = "own"

    def setup(self, view):
        self.seen, self.states = [], []

    def choose(self, view):
        return torch.arange(0, view.num_candidates, 3)

    def trained_edges(self, view):
        return torch.arange(view.num_candidates // 2)

    def needs_gradient(self, view):
        return (view.step + 1) % 3 == 0

    def after_step(self, view):
        self.seen.append((view.step, view.gradient.clone()))
        self.states.append({name: value.clone() for name, value in view.state.items()})


class Halving(Wiring):
    """Halves weights and momentum after every step, through the view."""

    def choose(self, view):
        return self.largest(view, view.k)

    def after_step(self, view):
        view.weight.mul_(0.5)
        view.momentum.mul_(0.25)


class HalvingData(Halving):
    """The same without a record of the change."""

    def after_step(self, view):
        view.weight.data.mul_(0.5)
        view.momentum.detach().numpy()[:] *= 0.25


def perceptron():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def transposed():
    return nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Flatten()).double()


def attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            return self.inner(x[None], x[None], x[None], need_weights=False)[0]

    return Attention().double()


def graph():
    return NeuralGraph((6, 5, 4), 9, node_function=nn.Tanh(), input_function=False).double()


def make(kind, rule):
    if kind == "graph":
        model = graph()
        model.rewire(rule, 9)
        return model
    model = {"transposed": transposed, "attention": attention}.get(kind, perceptron)()
    sparsify(model, 0.4, rule, distribution="global" if kind == "global" else "uniform")
    return model


def graphs(model):
    return [model] if isinstance(model, NeuralGraph) else list(weight_graphs(model).values())


def step(model, optimiser, x=X):
    optimiser.zero_grad()
    model(x).square().sum().backward()
    optimiser.step()


KINDS = ["graph", "perceptron", "global", "transposed", "attention"]
OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.05),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.05),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.05, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.05, amsgrad=True),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_trained_keeps_weight_and_state(kind, optimiser):
    model = make(kind, Probing())
    own = OPTIMISERS[optimiser](model.parameters())
    attach(model, own)
    before = [each.view().weight.detach().clone() for each in graphs(model)]
    for _ in range(4):
        step(model, own)
    for each, old in zip(graphs(model), before, strict=True):
        now, half = each.view().weight.detach(), each.num_candidates // 2
        assert torch.equal(now[half:], old[half:])
        assert (now[:half] != old[:half]).all()
        for value in each.wiring.states[-1].values():
            assert not value[half:].any()
            assert value[:half].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_all_candidates_comes_when_it_is_asked_for_and_stays_out_of_grad(kind):
    """Against the gradient that DNW gives to the same weights with the same real edges, over two micro-batches."""
    model = make(kind, Probing())
    own = OPTIMISERS["sgd"](model.parameters())
    attach(model, own)
    for number in range(1, 5):
        twin = copy.deepcopy(model)
        for each in graphs(twin):
            each.wiring.__class__ = type("All", (Probing,), {"trained": "all", "after_step": Wiring.after_step})
            each._needs_attach = False
        own.zero_grad()
        for x in (X, 2 * X):
            model(x).square().sum().backward()
            twin(x).square().sum().backward()
        grads = [each.weights[0].parameter.grad.clone() for each in graphs(model)]
        own.step()
        for each, other, grad in zip(graphs(model), graphs(twin), grads, strict=True):
            seen_step, seen = each.wiring.seen[-1]
            expected = torch.cat([weight.flat(weight.parameter.grad) for weight in other.weights])
            half = each.num_candidates // 2
            assert seen_step == number
            torch.testing.assert_close(seen[:half], expected[:half])
            torch.testing.assert_close(seen[half:], expected[half:] * (number == 3))
            if kind in ("graph", "perceptron"):
                assert not grad.flatten()[half:].any()


@pytest.mark.parametrize("rule", [Halving, HalvingData])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_rule_writes_reaches_the_parameters_and_the_optimiser(kind, rule):
    model = make(kind, rule())
    twin = copy.deepcopy(model)
    own, other = (OPTIMISERS["sgd"](each.parameters()) for each in (model, twin))
    attach(model, own)
    for each in graphs(twin):
        each.wiring.__class__ = type("Idle", (Halving,), {"after_step": Wiring.after_step})
        each._needs_attach = False
    for _ in range(3):
        step(model, own)
        step(twin, other)
        for each in dict.fromkeys(weight.parameter for graph in graphs(twin) for weight in graph.weights):
            with torch.no_grad():
                each.mul_(0.5)
                other.state[each]["momentum_buffer"].mul_(0.25)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["graph", "layer"])
def test_the_gradient_of_all_candidates_follows_a_model_that_is_converted_or_moved(kind):
    found = []
    for when in ("before", "attached", "halfway"):
        torch.manual_seed(0)
        model = NeuralGraph((6, 5, 4), 30, wiring=RigL(every=1)) if kind == "graph" else nn.Linear(6, 8)
        if kind == "layer":
            sparsify(model, 0.5, wiring=RigL(every=1))
        model = model.double() if when == "before" else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        (graph,) = attach(model, optimizer, 100).graphs.values()
        model = model.double() if when == "attached" else model
        for x in X.split(2):
            x = x[..., None, None] if kind == "graph" else x
            model(x.to(next(model.parameters()))).square().sum().backward()
            model.double()
        found.append(graph.weights[0].holder.probe.grad)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-6)
    model.to("meta")
    assert graph.weights[0].holder.probe is None


def test_a_rule_that_waits_for_steps_raises_at_its_second_backward_pass():
    for living in ("never attached", "the optimiser is gone", "a copy of the model"):
        model = NeuralGraph(
            (6, 5, 4), 9, wiring=TargetedDropout(Schedule(0.5, 0.6, 0, 9)), node_function=nn.Tanh()
        ).double()
        if living != "never attached":
            own = torch.optim.SGD(model.parameters(), 0.1)
            attach(model, own)
            for _ in range(3):
                step(model, own)
        if living == "the optimiser is gone":
            del own
            gc.collect()
        elif living == "a copy of the model":
            model = copy.deepcopy(model)
        loss = model(X).square().sum() + model(X).sum()  # two forward passes, one backward pass
        loss.backward()
        with pytest.raises(InputError, match=r"needs the steps of an optimiser, but none is attached: call dnw_graph"):
            model(X).sum().backward()
        own = torch.optim.SGD(model.parameters(), 0.1)
        attach(model, own)
        step(model, own)


@pytest.mark.parametrize("frozen", [0, 2])
def test_layers_that_share_a_ranking_notice_a_second_backward_pass_even_if_some_are_frozen(frozen):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    sparsify(model, 0.5, "rigl", distribution="global")
    model[frozen].requires_grad_(False)
    x = torch.ones(3, 6, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    with pytest.raises(InputError, match=r"needs the steps of an optimiser, but none is attached"):
        model(x).sum().backward()


@pytest.mark.parametrize("rule", [RigL(), GMP(), TargetedDropout(Schedule(0.5, 0.9)), ACDC()])
def test_a_schedule_in_fractions_of_an_unknown_training_is_refused_before_it(rule):
    model = NeuralGraph((6, 5, 4), 9, wiring=rule)
    own = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match=r"does not know how many steps training has: give it to dnw_graph\.attach"):
        attach(model, own)
    attach(model, own, 10)


@pytest.mark.parametrize("rule", [SET(), RigL(every=None, until=9), SparseMomentum()])
def test_rounds_of_epochs_of_unknown_length_are_refused_before_training(rule):
    model = NeuralGraph((6, 5, 4), 9, wiring=rule)
    own = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.raises(InputError, match=r"does not know how many steps an epoch has, its default for every=…: give"):
        attach(model, own, 10)
    assert model.updates is None
    attach(model, own, 10, steps_per_epoch=2)


@pytest.mark.parametrize("kind", ["graph", "perceptron", "global"])
@pytest.mark.parametrize("first", ["attach", "load"])
def test_a_number_of_steps_that_is_given_wins_over_that_of_a_loaded_state(kind, first):
    def attached(num_steps):
        model = make(kind, RigL())
        own = torch.optim.SGD(model.parameters(), 0.1)
        if num_steps is not None:
            attach(model, own, num_steps)
        return model, own

    saved, _ = attached(1000)
    model, own = attached(2000 if first == "attach" else None)
    model.load_state_dict(saved.state_dict())
    if first == "load":
        attach(model, own, 2000)
    assert [each.wiring.num_steps for each in graphs(model)] == [2000] * len(graphs(model))
    other, own = attached(None)
    other.load_state_dict(saved.state_dict())
    attach(other, own)
    assert {each.wiring.num_steps for each in graphs(other)} == {1000}


@pytest.mark.parametrize("rule", [ACDC((2, 4, 6)), GMP(0, 4, 2)])
@pytest.mark.parametrize("kind", ["graph", "global"])
def test_nothing_is_remembered_while_all_candidates_are_trained(kind, rule, monkeypatch):
    monkeypatch.setattr(partial_step, "ELEMENTWISE", ())  # as on a device
    model = make(kind, rule)
    own = OPTIMISERS["adam"](model.parameters())
    updates, remembered = attach(model, own), []
    own.register_step_pre_hook(lambda *_: remembered.append(len(updates._before)))
    for _ in range(3):
        step(model, own)
    assert remembered == [0, 0, 1]


def test_the_edges_of_layers_that_share_a_ranking_are_not_divided_on_a_device(monkeypatch):
    model = make("global", RigL(every=100))
    own = OPTIMISERS["sgd"](model.parameters())
    attach(model, own, 200)
    monkeypatch.setattr(partial_step, "ELEMENTWISE", ())  # as on a device
    monkeypatch.setattr(updates, "split_index", None)  # which waits for it
    step(model, own)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(fused, set_to_none):
    model = make("graph", Probing()).float()
    own = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    attach(model, own)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, torch.inf, 1.0, torch.inf, 1.0):
        own.zero_grad(set_to_none)
        scaler.scale(model(X.float()).square().sum() * factor).backward()
        scaler.step(own)
        scaler.update()
    assert [number for number, _ in model.wiring.seen] == [1, 2, 3]
    assert model.wiring.step == 3
    # The third step's gradient of all candidates is that of its own backward pass, not of the skipped one before it.
    seen = model.wiring.seen[-1][1]
    assert seen.isfinite().all()
    assert seen[model.num_candidates // 2 :].any()


@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_ranks_exchange_their_seed_on_the_device_of_the_model(device, monkeypatch):
    given = []
    monkeypatch.setattr(updates, "_num_ranks", lambda: 2)
    monkeypatch.setattr(updates.dist, "broadcast_object_list", lambda seed, **options: given.append(options))
    with FakeTensorMode():
        updates._common_seed(nn.Linear(2, 2, device=device))
    assert given == [{"device": torch.device(device) if device.startswith("cuda") else None}]


def test_a_closure_and_a_compiled_or_wrapped_model():
    model = make("perceptron", Probing())
    own = torch.optim.SGD(model.parameters(), 0.1)
    wrapped = torch.compile(AveragedModel(model).module, backend="eager")
    model = wrapped._orig_mod
    own = torch.optim.SGD(model.parameters(), 0.1)
    attach(wrapped, own)

    def closure():
        own.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        own.step(closure)
    assert [graph.full_name for graph in graphs(model)] == ["0.weight", "2.weight"]
    assert graphs(model)[0].wiring.seen[2][1].all()


def test_layers_without_a_gradient_sit_out():
    model = make("perceptron", Probing())
    model[0].parametrizations.weight.original.requires_grad_(False)
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    attach(model, own)
    step(model, own)
    frozen, other = graphs(model)
    assert (len(frozen.wiring.seen), len(other.wiring.seen)) == (0, 1)
    assert frozen.wiring.step == 1


@pytest.mark.parametrize("rule", [RigL(0.5, 2), SET(0.5, 2), SparseMomentum(every=2), GMP(0, 12, 2)])
def test_layers_that_are_frozen_later_keep_weights_and_edges(rule):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    sparsify(model, 0.4, rule)
    own = OPTIMISERS["sgd"](model.parameters())
    attach(model, own, 12, steps_per_epoch=2)
    for _ in range(4):
        step(model, own)
    frozen, other = graphs(model)
    model[0].requires_grad_(False)
    before = [(each.view().weight.detach().clone(), each.real_index) for each in (frozen, other)]
    for _ in range(4):
        step(model, own)
    same = [torch.equal(each.real_index, edges) for each, (_, edges) in zip((frozen, other), before, strict=True)]
    assert same == [True, False]
    assert torch.equal(frozen.view().weight, before[0][0])


@pytest.mark.parametrize("rule", [RigL(0.5, 2), SET(0.5, 2), SparseMomentum(every=2), GMP(0, 12, 2), ACDC((2, 4, 6))])
@pytest.mark.parametrize("later", [False, True])
def test_layers_that_share_a_ranking_are_frozen_together_or_refused(rule, later):
    """A round would overwrite frozen weights."""
    model = make("global", rule)
    own = OPTIMISERS["sgd"](model.parameters())
    if later:
        attach(model, own, 12, steps_per_epoch=2)
        step(model, own)
    model[0].requires_grad_(False)
    before = [each.detach().clone() for each in model.parameters()]
    with pytest.raises(InputError, match=r"^0\.weight is frozen .* but shares a ranking with 2\.weight"):
        step(model, own) if later else attach(model, own, 12, steps_per_epoch=2)
    assert all(map(torch.equal, before, model.parameters()))
    model.requires_grad_(False)
    model[2].bias.requires_grad_(True)
    attach(model, own, 12, steps_per_epoch=2)
    step(model, own)
    assert all(map(torch.equal, before[:-2], list(model.parameters())[:-2]))


@pytest.mark.parametrize("distribution", ["uniform", "global"])
@pytest.mark.filterwarnings("ignore:.* left the ranking of all layers")
def test_layers_that_become_dense_leave_the_optimiser_to_the_others(distribution):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    sparsify(model, 0.4, RigL(0.5, 2), distribution=distribution)
    own = OPTIMISERS["sgd"](model.parameters())
    updates = attach(model, own, 100)
    step(model, own)
    densify(model[0])
    (graph,) = graphs(model)
    edges = graph.real_index
    for _ in range(3):
        step(model, own)
    assert graph.wiring.step == 4
    assert not torch.equal(graph.real_index, edges)
    assert graph.num_real_edges == len(edges)
    assert model[0].weight.count_nonzero() > 0.4 * 48  # the others are trained too
    densify(model)
    step(model, own)
    updates.remove()


def test_a_round_without_a_finite_gradient_is_left_out():
    model = make("graph", RigL(0.5, 2))
    own = OPTIMISERS["sgd"](model.parameters())
    attach(model, own, 100)
    step(model, own)
    edges = model.real_index
    model(X).square().sum().backward()
    model.candidates.probe.grad[~torch.isin(torch.arange(74), edges)] = torch.inf
    with pytest.warns(UserWarning, match=r"graph, step 2: the gradient .* infinite: no edge is exchanged"):
        own.step()
    assert torch.equal(model.real_index, edges)
    for _ in range(2):
        step(model, own)
    assert not torch.equal(model.real_index, edges)


def by_autograd_grad(model, loss):
    for parameter, grad in zip(model.parameters(), torch.autograd.grad(loss(), list(model.parameters())), strict=True):
        parameter.grad = grad


def by_torch_func(model, _):
    named = dict(model.named_parameters())
    grads = torch.func.grad(lambda p: functional_call(model, p, (X,)).square().sum())(named)
    for name, parameter in named.items():
        parameter.grad = grads[name].detach()


GRADIENTS = {
    "autograd.grad": by_autograd_grad,
    "torch.func": by_torch_func,
    "inputs": lambda model, loss: loss().backward(inputs=list(model.parameters())),
    "loss.backward": lambda model, loss: loss().backward(),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", GRADIENTS)
@pytest.mark.parametrize("kind", ["graph", "perceptron"])
def test_a_round_refuses_gradients_that_leave_out_hallucinated_candidates(kind, way, ranks, monkeypatch):
    monkeypatch.setattr(updates, "_num_ranks", lambda: ranks)
    monkeypatch.setattr(updates.dist, "all_reduce", lambda tensor: tensor.mul_(ranks))
    monkeypatch.setattr(updates.dist, "broadcast_object_list", lambda seed, **options: None)
    model = make(kind, RigL(0.5, 2))
    own = OPTIMISERS["sgd"](model.parameters())
    attach(model, own, 100)
    step(model, own)
    before = [each.real_index for each in graphs(model)]
    own.zero_grad()
    GRADIENTS[way](model, lambda: model(X).square().sum())
    if way == "loss.backward":
        own.step()
        assert any(not torch.equal(each.real_index, old) for each, old in zip(graphs(model), before, strict=True))
        return
    name = "graph" if kind == "graph" else "0.weight"
    with pytest.raises(InputError, match=rf"^{name}: RigL needs .* all candidates, .* only loss\.backward\(\)"):
        own.step()


def test_a_rank_whose_images_do_not_reach_a_layer_takes_the_gradient_of_the_others(monkeypatch):
    monkeypatch.setattr(updates, "_num_ranks", lambda: 2)
    monkeypatch.setattr(updates.dist, "broadcast_object_list", lambda seed, **options: None)
    model = make("graph", Probing())
    own = OPTIMISERS["sgd"](model.parameters())
    attach(model, own)
    for _ in range(2):
        step(model, own)
    others = torch.rand(model.num_candidates, dtype=torch.float64)
    parts = {torch.int64: torch.ones(1, dtype=torch.int64), torch.float64: others}
    monkeypatch.setattr(updates.dist, "all_reduce", lambda tensor: tensor.add_(parts[tensor.dtype]))
    model.candidates.weight.grad = others / 2  # as DistributedDataParallel leaves it
    own.step()
    assert torch.equal(model.wiring.seen[2][1], others / 2)


def test_what_an_optimiser_does_after_the_step_of_its_base_class_is_held_back_too():
    class Shrinking(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for each in group["params"]:
                        each.mul_(0.5)

    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # from now on PyTorch calls hooks in the step of the base class too
    model = make("graph", Probing())
    before = model.view().weight.detach().clone()
    own = Shrinking(model.parameters(), 0.0)
    attach(model, own)
    for _ in range(2):
        step(model, own)
    assert torch.equal(model.view().weight[37:], before[37:])
    torch.testing.assert_close(model.view().weight[:37], before[:37] / 4)
    assert model.wiring.step == 2


def test_a_rule_with_a_schedule_of_its_own_sees_the_steps():
    class Growing(Wiring):
        def __init__(self):
            super().__init__()
            self.share, self.seen = Schedule(0.0, 1.0), []

        def choose(self, view):
            return self.largest(view, view.k)

        def choose_to_train(self, view):
            self.seen.append(round(self.share.at(view), 6))
            return self.choose(view)

    model = make("graph", Growing())
    own = OPTIMISERS["sgd"](model.parameters())
    attach(model, own, 5)
    for _ in range(5):
        step(model, own)
    assert model.wiring.seen == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_names_tell_graphs_of_a_model_apart_and_are_those_of_the_unwrapped_model():
    def drawn(wrap):
        torch.manual_seed(3)
        model = nn.ModuleList(NeuralGraph((6, 5, 4), 9, wiring=TargetedDropout(0.5)) for _ in range(2)).double()
        own = torch.optim.SGD(model.parameters(), 0.1)
        attach(wrap(model), own)
        return [torch.rand(3, generator=each.view().generator()).tolist() for each in model]

    first = drawn(lambda model: model)
    assert first[0] != first[1]
    assert first == drawn(lambda model: torch.compile(model, backend="eager"))


def test_attaching_again_replaces_the_hooks():
    model = make("graph", Probing())
    own = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        updates = attach(model, own)
    step(model, own)
    assert len(model.wiring.seen) == 1
    updates.remove()
    step(model, own)
    assert len(model.wiring.seen) == 1
    with pytest.raises(InputError, match="none is attached"):
        step(model, own)


@pytest.mark.parametrize("rules", [("str", "str"), ("rigl", "str"), ("rigl", "rigl")])
def test_an_optimiser_of_two_models_is_attached_once_to_both(rules):
    def make_both():
        torch.manual_seed(0)
        both = nn.ModuleList(perceptron() for _ in rules)
        for part, rule in zip(both, rules, strict=True):
            sparsify(part, wiring=STR(-2.0, 0.5) if rule == "str" else RigL(0.5, 2))
        return both, torch.optim.SGD(both.parameters(), 0.1, momentum=0.9, weight_decay=0.05)

    def train(both, own):
        for _ in range(5):
            own.zero_grad()
            sum(part(X).square().sum() for part in both).backward()
            own.step()
        return [*both.parameters(), *own.state_dict()["state"]]

    both, own = make_both()
    updates = attach(both[0], own, 10)
    message = r"SGD is attached to another model, with 0\.weight: call attach\(nn\.ModuleList\(\[first, second\]\), opt"
    with pytest.raises(InputError, match=message):
        attach(both[1], own, 10)
    assert all(graph.updates is updates for graph in graphs(both[0]))
    assert all(graph.updates is None for graph in graphs(both[1]))
    attach(both, own, 10)  # instead of the first time
    twins, other = make_both()
    attach(twins, other, 10)
    for a, b in zip(train(both, own), train(twins, other), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    updates = attach(both[0], own, 10)  # a part of it
    with pytest.raises(InputError, match=message):
        attach(both[1], own, 10)
    updates.remove()
    attach(both[1], own, 10)


def test_attaching_a_part_again_takes_over_that_part_only():
    model = make("perceptron", Probing())
    first, second = graphs(model)
    own = torch.optim.SGD(model.parameters(), 0.1)
    attach(model, own)
    other = torch.optim.SGD(model[0].parameters(), 0.1)
    attach(model[0], other)
    taken = set(model[0].parameters())
    own.param_groups[0]["params"] = [each for each in own.param_groups[0]["params"] if each not in taken]
    for _ in range(3):
        step(model, own)
    assert (first.wiring.step, second.wiring.step) == (0, 3)
    other.step()
    assert (first.wiring.step, second.wiring.step) == (1, 3)


def test_an_optimiser_that_is_not_attached_is_refused_while_another_one_is():
    model = make("perceptron", Probing())
    warm_up = torch.optim.SGD(model.parameters(), 0.1)
    attach(model, warm_up)
    step(model, warm_up)
    main, elsewhere = (
        torch.optim.Adam(model.parameters(), 0.1),
        torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1),
    )
    elsewhere.step()
    with pytest.raises(InputError, match=r"Adam has moved the weights of 0\.weight, but another optimiser is attached"):
        step(model, main)
    attach(model, main)
    step(model, main)
    with pytest.raises(InputError, match="SGD has moved the weights"):
        step(model, warm_up)


def test_an_optimiser_may_move_the_weights_once_nothing_is_attached():
    model = make("perceptron", Probing())
    attached = attach(model, torch.optim.SGD(model.parameters(), 0.1))
    attached.remove()
    other = torch.optim.SGD(model.parameters(), 0.1)
    step(model, other)


def test_an_optimiser_may_hold_weights_that_it_does_not_move():
    model = make("perceptron", Probing())
    attached = torch.optim.SGD(model.parameters(), 0.1)
    attach(model, attached)
    step(model, attached)
    attached.zero_grad()
    model.requires_grad_(False)
    head = torch.nn.Linear(2, 2).double()
    other = torch.optim.SGD([*model.parameters(), *head.parameters()], 0.1)
    head(torch.zeros(1, 2, dtype=torch.float64)).sum().backward()
    other.step()


class Both(torch.optim.Optimizer):
    """Steps by several optimisers, none of them an attribute."""

    def __init__(self, model):
        super().__init__(model.parameters(), {})
        self.parts = [torch.optim.SGD([each], 0.1) for each in model.parameters()]

    def step(self, closure=None):
        for each in self.parts:
            each.step()


def test_optimisers_within_the_attached_one_may_step():
    model = make("perceptron", Probing())
    both = Both(model)
    attach(model, both)
    for _ in range(3):
        step(model, both)
    assert [graph.wiring.step for graph in graphs(model)] == [3, 3]


class Around(torch.optim.Optimizer):
    """Steps by another optimiser, as SAM does."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base = base

    def step(self, closure=None):
        self.base.step()


def test_an_optimiser_around_the_attached_one_may_step():
    model = make("perceptron", Probing())
    base = torch.optim.SGD(model.parameters(), 0.1)
    attach(model, base)
    around = Around(base)
    for _ in range(3):
        step(model, around)
    assert [graph.wiring.step for graph in graphs(model)] == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["graph", "perceptron", "global"])
def test_a_compiled_model_notices_in_its_first_pass_that_nothing_is_attached(kind):
    model = make(kind, RigL(0.5, 2)).float()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(InputError, match="none is attached"):
        compiled(X.float())
    own = torch.optim.SGD(model.parameters(), 0.1)
    attach(model, own, 10)
    for _ in range(3):
        own.zero_grad()
        compiled(X.float()).square().sum().backward()
        own.step()
    assert {each.wiring.step for each in graphs(model)} == {3}


# --- state -----------------------------------------------------------------------------------------------------------


def test_another_number_of_edges_or_rule_is_refused_and_weights_alone_are_taken():
    model, fewer, fixed = graph(), graph(), graph()
    fewer.rewire("dnw", 8)
    fixed.rewire("random_graph", 9)
    state = model.state_dict()
    scalars = [value for name, value in state.items() if not name.endswith("weight")]
    assert [(value.dtype, value.dim()) for value in scalars] == [(torch.int64, 0)] * 2
    for strict in (True, False):
        with pytest.raises(InputError, match=r"graph: the state has num_edges = 9, the graph 8"):
            fewer.load_state_dict(state, strict=strict)
        with pytest.raises(InputError, match=r"edges of the state were chosen by 'random_graph', not by 'dnw'"):
            model.load_state_dict(fixed.state_dict(), strict=strict)
    fewer.load_weights(state)
    assert torch.equal(fewer.candidates.weight, model.candidates.weight)
    assert fewer.num_real_edges == 8
    model.load_state_dict({"candidates.weight": state["candidates.weight"]})  # an older file
    no_update = graph()
    no_update.rewire("no_update", 9)
    no_update.load_state_dict(state)  # no saved state decides its edges


@pytest.mark.parametrize(
    "state",
    [
        torch.zeros(25),
        torch.zeros(74, dtype=torch.int64),
        torch.full((74,), torch.nan),
        torch.zeros(74, device="meta"),
        torch.zeros(74).to_sparse(),
        {},
        {"candidates.weight": "x"},
        {1: torch.zeros(74)},
        [0.0] * 74,
        None,
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_changed(state):
    model = graph()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"state"):
        model.load_weights(state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_edges_that_an_average_has_spoiled_are_refused():
    class Turning(PruneAndGrow):
        def after_step(self, view):
            self.exchange(view, 3, 3, torch.rand(view.num_candidates, generator=view.generator()))

    model = make("perceptron", Turning(Schedule(0.5, 0.5), 1))
    own = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, own)
    average = copy.deepcopy(model)
    for _ in range(3):
        step(model, own)
        for a, b in zip(average.buffers(), model.buffers(), strict=True):
            a.copy_(a | b if a.dtype == torch.uint8 else a)
    with pytest.raises(InputError, match=r"0\.weight: wiring\.real are not the edges that the rule stored: an average"):
        average.eval()(X)


def test_fixed_edges_that_an_average_has_spoiled_are_refused():
    model = make("perceptron", "random_graph").eval()
    index = graphs(model)[0].wiring.index
    index.copy_(index // 2)
    with pytest.raises(InputError, match=r"0\.weight: wiring\.index are not the edges that the rule stored"):
        model(X)


def test_exchanged_edges_are_counted_and_real_ones_keep_weight_and_state():
    class Turning(PruneAndGrow):
        def after_step(self, view):
            self.before = view.weight.clone(), view.momentum.clone(), self.real
            self.exchange(view, 3, 3, torch.rand(view.num_candidates, generator=view.generator()))

    model = make("graph", Turning(Schedule(0.5, 0.5), 1))
    own = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attach(model, own)
    sets = [model.real_index.tolist()]
    for _ in range(5):
        step(model, own)
        sets.append(model.real_index.tolist())
        weight, momentum, real = model.wiring.before
        stay = real & model.wiring.real
        assert int(stay.sum()) >= 6
        now = model.view(optimizer=own)
        assert torch.equal(now.weight, weight * stay)
        assert torch.equal(now.momentum, momentum * stay)
    assert {len(each) for each in sets} == {9}
    assert any(a != b for a, b in pairwise(sets))


def test_every_layer_has_a_name_of_its_own():
    layers = nn.ModuleDict({"in": nn.Linear(6, 5), "out": nn.Linear(5, 2)})
    model = nn.ModuleDict({"reparametrizations": layers})
    sparsify(model, 0.5, TargetedDropout(0.5))
    handle = attach(model, torch.optim.SGD(model.parameters(), 0.1))
    assert list(handle.graphs) == ["reparametrizations.in.weight", "reparametrizations.out.weight"]


def test_graphs_of_one_name_are_all_attached(monkeypatch):
    monkeypatch.setattr(NeuralGraph, "full_name_at", lambda graph, path: "one")
    model = nn.ModuleList(NeuralGraph((6, 5, 4), 9, wiring=TargetedDropout(0.5)) for _ in range(3))
    handle = attach(model, torch.optim.SGD(model.parameters(), 0.1))
    assert list(handle.graphs.values()) == list(model)
    assert [graph.full_name for graph in model] == ["one", "1", "2"]
