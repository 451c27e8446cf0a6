"""Every rule that acts between steps against a plain NumPy loop, and what follows from its definition."""

import copy
import math
from itertools import pairwise, product

import numpy as np
import plain_rules as plain
import pytest
import torch
from pairs import every_value
from torch import nn

from dnw_graph import (
    ACDC,
    DNW,
    GMP,
    NM,
    SET,
    STR,
    Fixed,
    InputError,
    NeuralGraph,
    NoUpdate,
    RigL,
    Schedule,
    SparseMomentum,
    TopKAST,
    attach,
    wiring_penalty,
)
from dnw_graph.sparse_layers import sparsify, weight_graphs

STEPS = plain.STEPS
RULES = {
    "set": (lambda: SET(0.4, 7), plain.PlainSET),
    "rigl": (lambda: RigL(0.6, 6, 0.75), plain.PlainRigL),
    "rigl, update": (lambda: RigL(0.6, 6, 27, skip_update=False), plain.PlainRigLThatUpdates),
    "sparse_momentum": (lambda: SparseMomentum(every=6), plain.PlainSparseMomentum),
    "gmp": (lambda: GMP(4, 28, 8), plain.PlainGMP),
    "top_kast": (lambda: TopKAST(7, 0.03), plain.PlainTopKAST),
    "ac_dc": (lambda: ACDC((6, 12, 18, 24, 30)), plain.PlainACDC),
    "str": (lambda: STR(-2.0, 0.3), plain.PlainSTR),
    "nm": (lambda: NM(strength=0.05), plain.PlainNM),
}
TASKS = {"linear": plain.Linear(), "graph": plain.Graph(), "shared": plain.Shared()}
ROWS = {"linear": [(0, 4, 6)], "graph": [(0, 5, 6), (30, 4, 11)], "shared": [(0, 5, 6), (30, 4, 5)]}


def make(task, rule, k=None):
    if task == "linear":
        model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
        sparsify(model, None if isinstance(rule, NM) else (k or 9) / 24, rule)
        return model
    if task == "shared":
        # The weight of a transposed convolution is not in the order of the candidates.
        last = nn.Unflatten(1, (5, 1, 1)), nn.ConvTranspose2d(5, 4, 1, bias=False), nn.Flatten()
        model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), *last).double()
        sparsify(model, None if isinstance(rule, NM) else (k or 20) / 50, rule, distribution="global")
        return model
    k = None if isinstance(rule, NM) else k or 21
    functions = {"node_function": nn.Tanh(), "input_function": False, "output_function": False}
    graph = NeuralGraph(plain.SIZES, 21, **functions).double()
    graph.take(graph.prepare(rule, k))
    return nn.Sequential(graph)


def graph_of(model):
    return model[0] if isinstance(model[0], NeuralGraph) else next(iter(weight_graphs(model).values()))


def make_optimiser(model, kind, momentum=plain.MOMENTUM, decay=plain.DECAY):
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), plain.LR["adam"], plain.BETAS, plain.EPS, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), plain.LR["sgd"], momentum, weight_decay=decay)


def batch(number):
    """Inputs and targets; the map between them turns with time, so that edges keep changing."""
    generator = np.random.default_rng(number)
    x = generator.normal(size=(8, 6))
    turn = np.random.default_rng(1 + number // 9).normal(size=(6, 4))
    return x, x @ turn / 3


def step(model, optimiser, number):
    x, t = (torch.tensor(each) for each in batch(number))
    optimiser.zero_grad()
    ((model(x) - t).square().sum() + wiring_penalty(model)).backward()
    optimiser.step()


QUICK = [("linear", "sgd")]


@every_value(rest=pytest.mark.slow, name=RULES, task=TASKS, kind=["sgd", "adam"])
def test_weights_edges_and_state_are_those_of_a_plain_loop(name, task, kind):
    rule, loop = RULES[name]
    model = make(task, rule())
    graph = graph_of(model)
    optimiser = make_optimiser(model, kind)
    attach(model, optimiser, STEPS, steps_per_epoch=6)
    start = graph.view().weight.detach().numpy()
    loop = type(loop.__name__, (loop,), {"rows": ROWS[task]})
    expected = loop(
        start,
        plain.mask(graph.real_index.tolist(), len(start)),
        graph.num_edges,
        graph.wiring.seed,
        graph.full_name,
        kind == "adam",
    )
    sets = [graph.real_index.tolist()]
    for number in range(STEPS):
        step(model, optimiser, number)
        expected.step(TASKS[task], *batch(number))
        view = graph.view(optimizer=optimiser)
        np.testing.assert_allclose(view.weight.detach().numpy(), expected.w, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(view.momentum.numpy(), expected.m, rtol=1e-8, atol=1e-10)
        sets.append(graph.real_index.tolist())
        assert sets[-1] == np.flatnonzero(expected.real).tolist()
        assert graph.num_real_edges == len(sets[-1])
    assert sum(a != b for a, b in pairwise(sets)) >= 3
    if name == "str":
        assert graph.wiring.threshold.item() == pytest.approx(expected.s, rel=1e-8)
    elif name not in ("gmp", "ac_dc", "nm"):
        assert {len(each) for each in sets} == {graph.num_edges}


@every_value(rest=pytest.mark.slow, name=RULES, task=["graph", "shared"])
def test_resumed_at_any_step_to_the_same_bits(name, task):
    def start():
        model = make(task, RULES[name][0]())
        optimiser = make_optimiser(model, "sgd")
        attach(model, optimiser, STEPS, steps_per_epoch=6)
        return model, optimiser

    model, optimiser = start()
    saved = {}
    for number in range(22):
        if number >= 10:  # Every rule acts at least once.
            saved[number] = copy.deepcopy((model.state_dict(), optimiser.state_dict()))
        step(model, optimiser, number)
    torch.manual_seed(77)
    for first, states in saved.items():
        fresh = start()
        for each, state in zip(fresh, states, strict=True):
            each.load_state_dict(state)
        for number in range(first, 22):
            step(*fresh, number)
        assert fresh[0].state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, fresh[0].state_dict()[key]) for key, value in model.state_dict().items())


# --- what follows from the definitions -------------------------------------------------------------------------------


def trained(rule, kind="sgd", like=None, **options):
    """A graph after training, started from the weights and edges of another one."""
    torch.manual_seed(5)
    model = make("graph", rule)
    graph = graph_of(model)
    if like is not None:
        graph.candidates.weight.data.copy_(like)
    optimiser = make_optimiser(model, kind, **options)
    attach(model, optimiser, STEPS, steps_per_epoch=6)
    for number in range(STEPS):
        step(model, optimiser, number)
    return graph


@pytest.mark.parametrize("rule", [SET(0.0, 5), RigL(0.0, 5)], ids=["set", "rigl"])
def test_without_exchange_it_is_a_random_graph_of_the_same_edges(rule):
    torch.manual_seed(5)
    start = graph_of(make("graph", rule))
    graph = trained(rule)
    fixed = trained(Fixed(start.edge_index), like=start.candidates.weight)
    assert torch.equal(graph.real_index, start.real_index)
    assert torch.equal(graph.edge_weight, fixed.edge_weight)
    assert not graph.candidates.weight[graph.wiring.real == 0].any()


@pytest.mark.parametrize("kind", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_top_kast_with_all_candidates_is_dnw_bit_for_bit(kind):
    assert torch.equal(trained(TopKAST(74 - 21, 0.0), kind).candidates.weight, trained(DNW(), kind).candidates.weight)


@pytest.mark.slow
def test_top_kast_with_none_is_no_update_without_momentum_and_decay_only():
    for options, same in (({"momentum": 0.0, "decay": 0.0}, True), ({"momentum": 0.0}, False), ({"decay": 0.0}, False)):
        pair = [trained(rule, **options).candidates.weight for rule in (TopKAST(0, 0.0), NoUpdate())]
        assert torch.equal(*pair) == same


@pytest.mark.parametrize("rule", [SET(0.5, 6), SparseMomentum(0.5, 6), RigL(0.5, 6, 10 * STEPS)])
def test_no_edge_is_new_after_the_last_step(rule):
    model = make("linear", rule)
    optimiser = make_optimiser(model, "sgd")
    attach(model, optimiser, STEPS)
    for number in range(STEPS):
        step(model, optimiser, number)
    assert STEPS % 6 == 0
    assert graph_of(model).edge_weight.count_nonzero() == 9


def test_what_gmp_removes_never_comes_back_and_the_counts_are_those_of_the_formula():
    model = make("graph", GMP(0.0, 0.75, 9))
    graph = graph_of(model)
    optimiser = make_optimiser(model, "sgd")
    attach(model, optimiser, 36)
    sets = [set(graph.real_index.tolist())]
    for number in range(36):
        step(model, optimiser, number)
        sets.append(set(graph.real_index.tolist()))
    shares = {0: 0, 9: 1 - (2 / 3) ** 3, 18: 1 - (1 / 3) ** 3, 27: 1}
    expected = [round(74 - 53 * shares[min(27, t // 9 * 9)]) for t in range(37)]
    assert [len(each) for each in sets] == expected
    assert all(b <= a for a, b in pairwise(sets))


@pytest.mark.slow
def test_phases_of_ac_dc_are_those_of_the_paper():
    model = make("graph", ACDC())
    graph = graph_of(model)
    optimiser = make_optimiser(model, "sgd")
    attach(model, optimiser, 100)
    counts = []
    for number in range(100):
        counts.append(graph.num_real_edges)
        step(model, optimiser, number)
    compressed = [*(t for start in range(10, 80, 10) for t in range(start, start + 5)), *range(85, 100)]
    assert [t for t, count in enumerate(counts) if count == 21] == compressed
    assert {*counts} == {21, 74}
    assert graph.num_real_edges == 21


def test_ac_dc_starts_dense_phases_without_momentum_of_any_parameter():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    sparsify(model, 0.3, ACDC((2, 4, 6)))
    optimiser = make_optimiser(model, "sgd")
    attach(model, optimiser, 8)
    for number in range(5):
        step(model, optimiser, number)
        momenta = [optimiser.state[each]["momentum_buffer"].count_nonzero().item() for each in model.parameters()]
        assert (sum(momenta) == 0) == (number == 3)


def test_closed_forms_of_str():
    model = make("linear", STR(-5.0, 0.0))
    graph = graph_of(model)
    x, t = (torch.tensor(each) for each in batch(0))
    weight = graph.view().weight.detach().view(4, 6)
    sigma = 1 / (1 + math.exp(5.0))
    value = weight.sign() * (weight.abs() - sigma).clamp(min=0)
    torch.testing.assert_close(model(x), x @ value.T)
    (model(x) - t).square().sum().backward()
    dense = 2 * (x @ value.T - t).T @ x
    real = weight.abs() > sigma
    assert 0 < int((~real).sum()) < 24
    torch.testing.assert_close(graph.weights[0].parameter.grad, dense * real)
    slope = -sigma * (1 - sigma) * (dense * weight.sign() * real).sum()
    torch.testing.assert_close(graph.wiring.threshold.grad, slope)
    assert graph.num_real_edges == int(real.sum())
    assert torch.equal(graph.edge_weight, value[real])


def test_the_threshold_of_str_has_a_decay_of_its_own():
    model = make("linear", STR(-1.0, 0.25))
    threshold = graph_of(model).wiring.threshold
    optimiser = make_optimiser(model, "sgd", momentum=0.0)
    attach(model, optimiser)
    attach(model, optimiser)
    threshold.grad = torch.zeros_like(threshold)
    optimiser.step()
    assert threshold.item() == pytest.approx(-1 + plain.LR["sgd"] * 0.25)


@pytest.mark.parametrize(
    ("layer", "channels", "places"),
    [
        (lambda: nn.Linear(11, 3), 11, 1),
        (lambda: nn.Conv2d(6, 4, (3, 2)), 6, 6),
        (lambda: nn.Conv1d(12, 4, 3, groups=2), 6, 3),
        (lambda: nn.ConvTranspose2d(10, 6, 3, groups=2), 5, 9),
    ],
)
def test_groups_of_nm_are_input_channels_at_one_place_of_the_kernel(layer, channels, places):
    model = nn.Sequential(layer())
    sparsify(model, wiring="nm")
    graph = weight_graphs(model)["0.weight"]
    real = plain.mask(graph.real_index.tolist(), graph.num_candidates).reshape(-1, channels, places)
    weight = graph.candidate_weight.detach().abs().numpy().reshape(-1, channels, places)
    for target, place, group in product(range(len(real)), range(places), range(0, channels, 4)):
        part = np.s_[target, group : group + 4, place]
        assert np.flatnonzero(real[part]).tolist() == plain.top(weight[part], min(2, len(real[part])))


class Groups(nn.Module):
    """A linear layer as one layer per target and group of four inputs."""

    def __init__(self, weight):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 1, bias=False).double() for _ in range(weight.numel() // 4))
        for part, own in zip(self.parts, weight.reshape(-1, 1, 4), strict=True):
            part.weight.data.copy_(own)

    def forward(self, x):
        groups = x.split(4, dim=1)
        pairs = zip(self.parts, groups * (len(self.parts) // len(groups)), strict=True)
        return torch.cat([part(group) for part, group in pairs], dim=1).unflatten(1, (-1, len(groups))).sum(2)


def test_nm_without_decay_is_dnw_within_every_group():
    model = nn.Linear(8, 3, bias=False).double()
    groups = Groups(model.weight.detach())
    sparsify(model, wiring=NM(strength=0.0))
    sparsify(groups, 0.5, "dnw")
    optimisers = [make_optimiser(each, "sgd") for each in (model, groups)]
    generator, sets = torch.Generator().manual_seed(3), []
    for _ in range(STEPS):
        x, t = torch.randn(2, 11, 8, generator=generator, dtype=torch.float64)
        t = t[:, :3] + x[:, :3]
        for each, optimiser in zip((model, groups), optimisers, strict=True):
            optimiser.zero_grad()
            (each(x) - t).square().mean().backward()
            optimiser.step()
        sets.append(model.weight.detach().ne(0))
        torch.testing.assert_close(model.weight, torch.stack([part.weight for part in groups.parts]).view(3, 8))
    assert not all(torch.equal(each, sets[0]) for each in sets)


def test_another_density_than_that_of_nm_is_refused():
    message = r"0\.weight: the rule NM has 16 of 32 edges; got num_edges = 8: leave"
    with pytest.raises(InputError, match=message):
        sparsify(nn.Sequential(nn.Linear(8, 4)), 0.25, "nm")
    with pytest.raises(InputError, match=r"the rule NM has .* got num_edges = 9"):
        NeuralGraph((6, 5, 4), 9, wiring="nm")
    sparsify(nn.Sequential(nn.Linear(8, 4)), 0.5, "nm")
    assert NeuralGraph((6, 5, 4), wiring="nm").num_edges == 5 * 4 + 4 * 6


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SET(1.5), "fraction must be a share within"),
        (lambda: RigL(alpha=-0.1), "alpha must be 0 or more"),
        (lambda: RigL(every=0), "every must be an integer >= 1"),
        (lambda: RigL(until=1.5), "until of a schedule must be a step"),
        (lambda: GMP(0.5, 0.25), "a schedule cannot begin at 0.5 and end earlier"),
        (lambda: TopKAST(-1), "extra must be a number of candidates"),
        (lambda: TopKAST(strength=-1.0), "strength must be 0 or more"),
        (lambda: ACDC(()), "switches must be an odd number of ascending moments"),
        (lambda: ACDC((0.1, 0.2)), "switches must be an odd number of ascending moments"),
        (lambda: ACDC((0.3, 0.2, 0.4)), "switches must be an odd number of ascending moments"),
        (lambda: ACDC([10.0, 20.0, 30.0]), r"switches must be .* a fraction of training \(0\.0 … 1\.0\); got"),
        (lambda: ACDC([0.1, 0.5, 1e3]), r"switches must be .* a fraction of training \(0\.0 … 1\.0\); got"),
        (lambda: ACDC([0.5, 100, 300]), r"switches must be all steps or all fractions; got \[0\.5, 100, 300\]"),
        (lambda: STR(weight_decay=-1.0), "weight_decay must be 0 or more"),
        (lambda: NM(5, 4), "n must be an integer in 1 … m = 4"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# --- all dynamics and layers ------------------------------------------------------------------------------------------


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (6, 1, 1)),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
    ).double()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True).double()
        self.out = nn.Linear(6, 4).double()

    def forward(self, x):
        return self.out(self.inner(x[None], x[None], x[None], need_weights=False)[0][0])


def dynamic(dynamics):
    def build(rule):
        graph = NeuralGraph(
            num_nodes=11, num_inputs=6, num_outputs=4, num_edges=40, dynamics=dynamics, node_function=nn.Tanh()
        ).double()
        graph.take(graph.prepare(rule, None if isinstance(rule, NM) else 40))
        return nn.Sequential(graph)

    return build


def layers(model, distribution):
    def build(rule):
        made = model()
        sparsify(made, None if isinstance(rule, NM) else 0.4, rule, distribution=distribution)
        return made

    return build


def places():
    from dnw_graph import Continuous, Discrete

    return {
        "discrete": dynamic(Discrete(3)),
        "continuous": dynamic(Continuous("euler", options={"step_size": 0.5})),
        "convolutions": layers(convolutions, "uniform"),
        "attention": layers(Attention, "uniform"),
        "shared": layers(convolutions, "global"),
    }


@every_value(rest=pytest.mark.slow, name=RULES, place=["discrete", "continuous", "convolutions", "attention", "shared"])
def test_in_all_dynamics_and_layers_edges_change_and_what_is_not_trained_stays(name, place):
    rule = RULES[name][0]()
    model = places()[place](rule)
    graphs = [each for each in model.modules() if hasattr(each, "real_index")]
    optimiser = torch.optim.SGD(model.parameters(), 0.004, plain.MOMENTUM, weight_decay=plain.DECAY)
    attach(model, optimiser, STEPS, steps_per_epoch=6)
    changed, total = 0, sum(graph.num_edges for graph in graphs)
    for number in range(STEPS):
        before = [(graph.trained_edges(), graph.view().weight.detach().clone()) for graph in graphs]
        sets = [graph.real_index.tolist() for graph in graphs]
        step(model, optimiser, number)
        for graph, (still, weight), edges in zip(graphs, before, sets, strict=True):
            now = graph.view().weight.detach()
            changed += graph.real_index.tolist() != edges
            if still is not None and name != "gmp":
                frozen = torch.ones_like(now, dtype=torch.bool)
                frozen[still] = False
                frozen[graph.real_index] = False
                assert torch.equal(now[frozen], weight[frozen] * (now[frozen] != 0))
    assert changed >= 2
    assert sum(graph.num_edges for graph in graphs) == total


def test_a_copy_goes_on_with_an_optimiser_of_its_own():
    model = make("graph", RigL(0.5, 4))
    optimiser = make_optimiser(model, "sgd")
    attach(model, optimiser, STEPS)
    for number in range(10):
        step(model, optimiser, number)
    twin = copy.deepcopy(model)
    other = make_optimiser(twin, "sgd")
    attach(twin, other, STEPS)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for number in range(10, 20):
        step(model, optimiser, number)
        step(twin, other, number)
    assert torch.equal(graph_of(model).candidates.weight, graph_of(twin).candidates.weight)


@pytest.mark.parametrize(("rule", "number"), [(SET(0.29, 1), 29), (SparseMomentum(0.07, 1), 7)])
def test_a_share_of_the_edges_is_that_of_the_decimal_number(rule, number):
    graph = NeuralGraph((20, 20), 100, wiring=rule)
    graph.wiring.num_steps = 1000
    assert graph.wiring.number(graph.view(), 1) == number


def test_schedules_of_set_may_fall():
    graph = trained(SET(Schedule(0.5, 0.0), 6))
    assert graph.num_real_edges == 21
