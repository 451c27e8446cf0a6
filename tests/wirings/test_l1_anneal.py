from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from reference import top_k
from step_loops import attached
from torch.utils.checkpoint import checkpoint

from dnw_graph import InputError, L1Anneal, NeuralGraph, Schedule, attach, wiring_penalty

X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
N, K = 26, 9


def make_graph(wiring, propagation="block"):
    return NeuralGraph((3, 4, 2), K, wiring=wiring, propagation=propagation, name="stage2")


def train(graph, steps, after_step=lambda graph: None):
    """Return the set of real edges of every step."""
    seen = []

    def see(propagation, args, output):
        if graph.training:
            seen.append(set(args[0].index.tolist()))

    graph.propagation.register_forward_hook(see)
    optimiser = torch.optim.SGD(graph.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    attach(graph, optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        ((graph(X) ** 2).mean() + graph.penalty()).backward()
        optimiser.step()
        after_step(graph)
    return seen


def shares(shape, steps):
    """s(t) over so many steps, exact."""
    t = [Fraction(step, steps - 1) for step in range(steps)]
    return [1 - (1 - each) ** 3 if shape == "cubic" else each for each in t]


@pytest.mark.parametrize("given_by", ["fractions", "steps"])
@pytest.mark.parametrize("shape", ["linear", "cubic"])
def test_number_of_edges_follows_the_schedule_and_no_edge_returns(shape, given_by):
    steps = 12
    span = (0.0, 1.0) if given_by == "fractions" else (0, steps - 1)
    graph = make_graph(L1Anneal(0.01, Schedule(0.0, 1.0, *span, shape)))

    def disturb(graph):
        """Give removed edges the largest weights of all."""
        gone = sorted(set(range(N)) - set(graph.real_index.tolist()))
        graph.candidates.weight.data[gone] = 100.0

    seen = train(graph, steps, disturb)
    assert [len(edges) for edges in seen] == [N - round(share * (N - K)) for share in shares(shape, steps)]
    assert (len(seen[0]), len(seen[-1])) == (N, K)
    assert all(now <= before for before, now in pairwise(seen))
    assert set(graph.eval().real_index.tolist()) == seen[-1]


def test_edges_may_be_removed_in_a_part_of_training():
    graph = make_graph(L1Anneal(removal=Schedule(0.0, 1.0, 0.25, 0.5)))
    counts = [len(edges) for edges in train(graph, 21)]
    assert counts[:6] == [N] * 6
    assert N > counts[6] > counts[9] > K
    assert counts[10:] == [K] * 11


def test_the_weakest_of_those_left_are_removed_ties_to_the_lower_index():
    graph = make_graph(L1Anneal(0.0, Schedule(0.0, 1.0, 0, 2)))
    weight = graph.candidates.weight.data
    weight[3:15] = weight[3]
    weight[7] = -weight[3]
    left = list(range(N))
    optimiser = torch.optim.SGD(graph.parameters(), lr=0.0)
    attach(graph, optimiser)
    for keep in (N, N - 8, K):  # 26 - 17/2 = 17.5 → 18, since round(8.5) is 8
        left = [left[i] for i in top_k(weight[left].tolist(), keep)]
        graph(X).sum().backward()
        optimiser.step()
        assert graph.real_index.tolist() == left


@pytest.mark.parametrize("propagation", ["block", "message_passing"])
def test_removed_edges_get_no_gradient(propagation):
    graph = make_graph(L1Anneal(0.5, Schedule(1.0, 1.0, 0, 0)), propagation)
    (graph(X).sum() + graph.penalty()).backward()
    gone = sorted(set(range(N)) - set(top_k(graph.candidates.weight.tolist(), K)))
    assert (graph.candidates.weight.grad[gone] == 0).all()


def test_penalty_and_its_gradient_are_those_of_the_edges_left():
    graph = make_graph(L1Anneal(0.25, Schedule(0.0, 1.0, 0, 1)))
    step = attached(graph)
    for real in (N, K):
        graph(X)
        weights = graph.candidates.weight.tolist()
        left = top_k(weights, real)
        graph.zero_grad()
        penalty = graph.penalty()
        penalty.backward()
        assert penalty.item() == pytest.approx(0.25 * sum(abs(weights[i]) for i in left), rel=1e-6)
        signs = [0.25 * ((weights[i] > 0) - (weights[i] < 0)) if i in left else 0 for i in range(N)]
        assert graph.candidates.weight.grad.tolist() == signs
        step()
    assert {-0.25, 0.25} < set(signs)


def test_strength_follows_its_schedule():
    graph = make_graph(L1Anneal(Schedule(0.0, 0.4, 0.0, 1.0), Schedule(0.0, 0.0, 0, 0)))
    step = attached(graph, 5)
    for strength in (0.0, 0.1, 0.2, 0.3, 0.4, 0.4):
        graph(X)
        total = sum(map(abs, graph.candidates.weight.tolist()))
        assert graph.penalty().item() == pytest.approx(strength * total, rel=1e-6)
        step()


def test_the_penalty_of_a_model_is_the_sum_over_its_graphs():
    rule = L1Anneal(0.5, Schedule(0.0, 0.0, 0, 0))
    first, second, other = make_graph(rule), NeuralGraph((2, 3), 4, wiring=rule), NeuralGraph((3, 2), 4)
    model = torch.nn.Sequential(first, torch.nn.Sequential(second, other))
    model(X)
    weights = first.candidates.weight.tolist() + second.candidates.weight.tolist()
    assert wiring_penalty(model).item() == pytest.approx(0.5 * sum(map(abs, weights)), rel=1e-6)
    for rest in (other, torch.nn.Linear(2, 2)):
        assert wiring_penalty(rest).item() == 0
        assert not wiring_penalty(rest).requires_grad


def test_evaluation_and_looking_do_not_remove():
    def look(graph):
        graph.eval()
        for _ in range(3):
            graph(X)
        graph.train()
        assert graph.num_real_edges == graph.edge_index.size(1) == graph.to_data().num_edges
        graph.live_nodes()
        graph.update_wiring()

    seen = []
    for after_step in (lambda graph: None, look):
        torch.manual_seed(3)
        graph = make_graph(L1Anneal(0.01))
        seen.append(train(graph, 12, after_step))
    assert seen[0] == seen[1]


def test_before_training_it_is_complete():
    graph = make_graph(L1Anneal()).eval()
    graph(X)
    assert graph.num_real_edges == N


def test_given_to_a_graph_anew_it_starts_complete():
    graph = make_graph(L1Anneal(0.01, Schedule(0.0, 1.0, 0, 3)))
    train(graph, 4)
    assert graph.num_real_edges == K
    graph.reset_parameters()
    assert len(train(graph, 1)[0]) == N


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_removes_nothing_more(use_reentrant):
    results = []
    for through in (lambda graph, x: graph(x), lambda graph, x: checkpoint(graph, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        graph = make_graph(L1Anneal(0.01, Schedule(0.0, 1.0, 0, 4)))
        optimiser = torch.optim.SGD(graph.parameters(), lr=0.5)
        attach(graph, optimiser)
        for _ in range(3):
            optimiser.zero_grad()
            x = X.clone().requires_grad_()
            ((through(graph, x) ** 2).mean() + graph.penalty()).backward()
            optimiser.step()
        results.append((x.grad, graph.candidates.weight.detach(), graph.num_real_edges))
    assert results[0][2] == results[1][2] == N - round(0.5 * (N - K))
    torch.testing.assert_close(results[0][:2], results[1][:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1e-5}, "strength must be 0 or more; got -1e-05"),
        ({"strength": Schedule(0.1, -0.1)}, "strength must be 0 or more"),
        ({"strength": "strong"}, "L1Anneal: strength must be a finite number, a Schedule or a mapping"),
        (
            {"removal": Schedule(0.0, 1.1)},
            "removal must be a share within 0 … 1",
        ),
        (
            {"removal": Schedule(-0.1, 1.0)},
            "removal must be 0 or more",
        ),
        (
            {"removal": Schedule(0.6, 0.5)},
            "removal must be a schedule that increases",
        ),
        ({"removal": {"start": 0.0}}, "the schedule of removal needs start and end"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, unchecked):
    with pytest.raises(InputError) as error:
        L1Anneal(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
