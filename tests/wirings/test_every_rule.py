"""What every rule promises, step by step against plain loops, in all three dynamics."""

from dataclasses import dataclass, field

import pytest
import torch
from dynamic_reference import all_pairs, euler, plain_discrete, product, summed_gradient
from pairs import every_pair
from reference import candidate_gradient, plain_forward, static_pairs, top_k
from torch import nn

from dnw_graph import Continuous, Discrete, InputError, NeuralGraph, attach
from dnw_graph.wirings import (
    DNW,
    WIRINGS,
    Complete,
    FineTune,
    L1Anneal,
    LotteryTicket,
    NoUpdate,
    RandomGraph,
    Schedule,
    TargetedDropout,
    create_wiring,
)

SIZES, STATIC_K = (3, 4, 3), 9
NODES, INPUTS, OUTPUTS, DYNAMIC_K = 7, 3, 2, 16
LR, MOMENTUM, WEIGHT_DECAY = 0.3, 0.9, 0.05
STEPS = 6
STRENGTH = 0.02


def fan_in_top(weights, pairs, k):
    """All but the ⌊γ · fan-in⌋ of smallest |w| into every node, node by node, γ = 1 - k/n."""
    n = len(weights)
    kept = []
    for node in {v for _, v in pairs}:
        into = [i for i, (_, v) in enumerate(pairs) if v == node]
        dropped = (n - k) * len(into) // n
        kept += [into[place] for place in top_k([weights[i] for i in into], len(into) - dropped)]
    return sorted(kept)


@dataclass
class Plain:
    """A rule in plain Python.

    ``train`` says which edges a training step has, given the weights before it and, for rules that draw, the edges that
    were drawn; ``evaluate`` says which evaluation has.
    """

    initial: list[float]
    pairs: list[tuple[int, int]]
    k: int
    trained: list[float]
    trains_all: bool = False
    strength: float = 0.0
    left: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.left = list(range(len(self.initial)))

    def evaluate(self, weights):
        return self.train(0, weights, [])


class PlainDNW(Plain):
    def train(self, step, weights, drawn):
        return top_k(weights, self.k)


class PlainRandomGraph(Plain):
    def train(self, step, weights, drawn):
        return top_k(self.initial, self.k)


class PlainComplete(Plain):
    def train(self, step, weights, drawn):
        return list(range(len(weights)))


class PlainSecondStage(Plain):
    def train(self, step, weights, drawn):
        return top_k(self.trained, self.k)


class PlainAnneal(Plain):
    """Complete at step 0, k edges from step 4 on, the same number removed in every step between."""

    def train(self, step, weights, drawn):
        keep = len(weights) - round(min(step / 4, 1) * (len(weights) - self.k))
        self.left = [self.left[i] for i in top_k([weights[i] for i in self.left], keep)]
        return self.left

    def evaluate(self, weights):
        return self.left


class PlainDropout(Plain):
    def train(self, step, weights, drawn):
        return sorted({*self.evaluate(weights), *drawn})

    def evaluate(self, weights):
        return top_k(weights, self.k)


class PlainRegularDropout(PlainDropout):
    def evaluate(self, weights):
        return fan_in_top(weights, self.pairs, self.k)


RULES = {
    "dnw": (lambda trained, initial: DNW(), PlainDNW, {"trains_all": True}),
    "no_update": (lambda trained, initial: NoUpdate(), PlainDNW, {}),
    "random_graph": (lambda trained, initial: RandomGraph(), PlainRandomGraph, {}),
    "complete": (lambda trained, initial: Complete(), PlainComplete, {"trains_all": True}),
    "lottery_ticket": (LotteryTicket, PlainSecondStage, {}),
    "fine_tune": (lambda trained, initial: FineTune(trained), PlainSecondStage, {}),
    "l1_anneal": (
        lambda trained, initial: L1Anneal(STRENGTH, Schedule(0.0, 1.0, 0, 4)),
        PlainAnneal,
        {"strength": STRENGTH},
    ),
    "targeted_dropout": (lambda trained, initial: TargetedDropout(0.5), PlainDropout, {}),
    "targeted_dropout, regular": (
        lambda trained, initial: TargetedDropout(0.5, "regular"),
        PlainRegularDropout,
        {},
    ),
}


def make_graph(dynamics, propagation):
    if dynamics == "static":
        options = {"blocks": SIZES, "num_edges": STATIC_K}
    else:
        kind = Discrete(3) if dynamics == "discrete" else Continuous("euler", options={"step_size": 0.25})
        options = {
            "num_nodes": NODES,
            "num_inputs": INPUTS,
            "num_outputs": OUTPUTS,
            "num_edges": DYNAMIC_K,
            "dynamics": kind,
        }
    return NeuralGraph(**options, node_function=nn.Tanh(), propagation=propagation).double()


def plain_output(dynamics, pairs, weights, edges, x):
    """The output over the given edges with their signed weights, and a function that gives ⟨Z_u, ∂L/∂I_v⟩."""
    if dynamics == "static":
        chosen = {pairs[i]: weights[i] for i in edges}
        first_output = sum(SIZES[:-1])  # the outputs have no node function
        states, offsets = plain_forward(x, SIZES, chosen, lambda v, i: torch.tanh(i) if v < first_output else i)
        return torch.stack(states[first_output:], dim=1), lambda u, v: candidate_gradient(states, offsets, u, v)
    matrix = torch.zeros(NODES, NODES, dtype=x.dtype)
    for i in edges:
        u, v = pairs[i]
        matrix[v, u] = weights[i]
    if dynamics == "discrete":
        states, sent, offsets = plain_discrete(x, matrix, 3, lambda received, step: torch.tanh(received))
    else:
        sent, offsets = [], []

        def field(t, z):
            sent.append(z)
            offsets.append(torch.zeros_like(z).requires_grad_())
            return torch.tanh(product(matrix, z) + offsets[-1])

        empty = torch.zeros(x.size(0), NODES - INPUTS, *x.shape[2:], dtype=x.dtype)
        states = euler(field, torch.cat([x, empty], dim=1), (0.0, 1.0), 4)
    return states[-1][:, -OUTPUTS:], lambda u, v: summed_gradient(sent, offsets, u, v)


def loss_of(out):
    """Weighs every value differently."""
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()


def edges_of(graph):
    """The flat indices of the real edges of every forward pass to come."""
    seen = []
    graph.propagation.register_forward_hook(lambda module, args, output: seen.append(args[0].index.tolist()))
    return seen


@every_pair(
    rest=pytest.mark.slow,
    rule=RULES,
    dynamics=["static", "discrete", "continuous"],
    propagation=["block", "message_passing"],
)
def test_edges_outputs_gradients_and_updates(rule, dynamics, propagation):
    make, plain, options = RULES[rule]
    graph = make_graph(dynamics, propagation)
    pairs = static_pairs(SIZES) if dynamics == "static" else all_pairs(NODES)
    n, k = len(pairs), graph.num_edges
    trained = torch.randn(n, dtype=torch.float64)
    initial = graph.candidates.weight.detach().clone()
    graph.rewire(make(trained, initial), k)
    weights = trained.tolist() if rule == "fine_tune" else initial.tolist()
    expected = plain(list(weights), pairs, k, trained.tolist(), **options)
    used = edges_of(graph)
    optimiser = torch.optim.SGD(graph.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    attach(graph, optimiser)
    buffers = [0.0] * n
    x = torch.randn(3, INPUTS, 2, 2, dtype=torch.float64)
    signs, sets = set(), set()
    for step in range(STEPS):
        out = graph(x)
        edges = expected.train(step, weights, used[-1])
        assert used[-1] == edges
        reference, gradient_of = plain_output(dynamics, pairs, weights, edges, x)
        torch.testing.assert_close(out, reference, rtol=1e-10, atol=1e-12)

        optimiser.zero_grad()
        penalty = graph.penalty()
        (loss_of(out) if penalty is None else loss_of(out) + penalty).backward()
        loss_of(reference).backward()
        gradient = [0.0] * n
        for i in range(n) if expected.trains_all else edges:
            sign = (weights[i] > 0) - (weights[i] < 0)
            gradient[i] = gradient_of(*pairs[i]) + expected.strength * sign
        found = graph.candidates.weight.grad
        torch.testing.assert_close(found, torch.tensor(gradient, dtype=torch.float64), rtol=1e-9, atol=1e-11)
        if not expected.trains_all:
            assert all(found[i] == 0 for i in set(range(n)) - set(edges))

        optimiser.step()
        for i in range(n):
            buffers[i] = MOMENTUM * buffers[i] + gradient[i] + WEIGHT_DECAY * weights[i]
            weights[i] -= LR * buffers[i]
        torch.testing.assert_close(graph.candidates.weight.tolist(), weights, rtol=1e-9, atol=1e-11)

        graph.eval()
        with torch.no_grad():
            out = graph(x)
        left = expected.evaluate(weights)
        assert used[-1] == left == graph.real_index.tolist()
        assert graph.num_real_edges == len(left)
        torch.testing.assert_close(out, plain_output(dynamics, pairs, weights, left, x)[0], rtol=1e-9, atol=1e-11)
        graph.train()
        sets.add(tuple(edges))
        signs |= {weights[i] > 0 for i in edges}
        weights = graph.candidates.weight.tolist()
    assert signs == {True, False}
    fixed = rule in ("random_graph", "complete", "lottery_ticket", "fine_tune")
    assert (len(sets) == 1) == fixed  # the others did change their edges


STATEFUL = {
    "random_graph": lambda weight: RandomGraph(),
    "random_graph, scores": lambda weight: RandomGraph(separate_scores=True),
    "l1_anneal": lambda weight: L1Anneal(Schedule(0.0, 0.1, 0.0, 1.0)),
    "targeted_dropout": lambda weight: TargetedDropout(Schedule(0.2, 0.9, 0.0, 1.0)),
    "targeted_dropout, regular": lambda weight: TargetedDropout("gamma", "regular"),
    "lottery_ticket": lambda weight: LotteryTicket(weight.flip(0), weight),
    "fine_tune": lambda weight: FineTune(weight.flip(0)),
}
# What a fresh process has: the same options, but none of the weights of a first stage.
FRESH = {"lottery_ticket": lambda weight: LotteryTicket(), "fine_tune": lambda weight: FineTune()}


def steps(graph, optimiser, numbers):
    """Train on images that depend on the number of the step; return losses and edges."""
    seen = edges_of(graph)
    losses = []
    for number in numbers:
        x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(number))
        optimiser.zero_grad()
        loss = (graph(x) ** 2).mean()
        penalty = graph.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, seen


@pytest.mark.parametrize("rule", STATEFUL)
def test_a_graph_continued_from_its_state_goes_on_exactly(rule, tmp_path):
    def sgd(graph):
        optimiser = torch.optim.SGD(graph.parameters(), 0.5, momentum=0.9, weight_decay=0.01)
        attach(graph, optimiser, 9)
        return optimiser

    graph = NeuralGraph((3, 5, 4), 11)
    graph.rewire(STATEFUL[rule](graph.candidates.weight.detach().clone()), 11)
    optimiser = sgd(graph)
    steps(graph, optimiser, range(4))
    torch.save((graph.state_dict(), optimiser.state_dict()), tmp_path / "state.pt")
    expected = steps(graph, optimiser, range(4, 9))

    torch.manual_seed(123)
    fresh = NeuralGraph((3, 5, 4), 11)
    fresh.rewire(FRESH.get(rule, STATEFUL[rule])(fresh.candidates.weight.detach().clone()), 11)
    state, optimiser_state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh.load_state_dict(state)
    optimiser = sgd(fresh)
    optimiser.load_state_dict(optimiser_state)
    assert steps(fresh, optimiser, range(4, 9)) == expected
    assert fresh.state_dict().keys() == graph.state_dict().keys()
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in graph.state_dict().items())
    assert fresh.eval().real_index.tolist() == graph.eval().real_index.tolist()


LOADED = {**dict.fromkeys(WIRINGS), **STATEFUL}


@pytest.mark.parametrize("name", LOADED)
def test_loaded_weights_stay(name):
    graph = NeuralGraph((3, 5, 4), 11)
    rule = name if LOADED[name] is None else LOADED[name](graph.candidates.weight.detach().clone())
    graph.take(graph.prepare(rule, None if name == "nm" else 11))
    edges, weight = graph.real_index, torch.randn(graph.num_candidates)
    graph.load_weights(weight)
    expected = weight
    if name in ("set", "rigl", "sparse_momentum"):  # Hallucinated weights are zero, and the strongest stay.
        real = top_k(weight.tolist(), 11)
        assert graph.real_index.tolist() == real
        expected = torch.zeros_like(weight).index_fill_(0, torch.tensor(real), 1) * weight
    assert torch.equal(graph.candidates.weight, expected)
    if name in ("fine_tune", "lottery_ticket"):
        assert torch.equal(graph.real_index, edges)
    graph.load_weights(graph.state_dict())
    assert torch.equal(graph.candidates.weight, expected)


@pytest.mark.parametrize("name", WIRINGS)
def test_every_name_makes_its_rule_anew(name):
    first, second = create_wiring(name), create_wiring(name)
    assert type(first) is type(second) is WIRINGS[name]
    assert first is not second


def test_options_come_with_the_name():
    wiring = create_wiring("targeted_dropout", rho={"start": 0.5, "end": 1.0, "shape": "cosine"}, variant="regular")
    assert wiring.rho == Schedule(0.5, 1.0, shape="cosine")
    assert wiring.variant == "regular"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("targeted_dropou", {}, "unknown wiring 'targeted_dropou': did you mean 'targeted_dropout'"),
        ("targeted_dropout", {"roh": 0.5}, "unknown option of wiring 'targeted_dropout' 'roh': did you mean 'rho'"),
        ("dnw", {"k": 3}, "wiring 'dnw' has no options; got 'k'"),
        ("complete", {"k": 3}, "wiring 'complete' has no options; got 'k'"),
        ("l1_anneal", {"strength": -1.0}, "got -1.0"),
        ("lottery_ticket", {"trained": "a.ckpt"}, "trained must be a tensor"),
    ],
)
def test_unknown_names_and_options_are_refused(name, options, message, unchecked):
    with pytest.raises(InputError) as error:
        create_wiring(name, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
