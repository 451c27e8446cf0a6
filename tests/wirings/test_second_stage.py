"""Lottery Ticket and Fine Tune as the rules of one graph."""

import pytest
import torch
from reference import top_k

from dnw_graph import Discrete, FineTune, InputError, LotteryTicket, NeuralGraph
from dnw_graph.analysis.cost import cost

N, K = 26, 9
TRAINED = torch.randn(N, generator=torch.Generator().manual_seed(1))
INITIAL = torch.rand(N, generator=torch.Generator().manual_seed(2)) - 0.5
X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
RULES = {"lottery_ticket": lambda: LotteryTicket(TRAINED, INITIAL), "fine_tune": lambda: FineTune(TRAINED)}
STARTS = {"lottery_ticket": INITIAL, "fine_tune": TRAINED}


def make_graph(wiring, k=K):
    return NeuralGraph((3, 4, 2), k, wiring=wiring, name="stage2")


def train(graph, steps=4):
    optimiser = torch.optim.SGD(graph.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        (graph(X) ** 2).mean().backward()
        optimiser.step()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, K, N])
def test_edges_of_the_trained_graph_and_weights_to_start_from(rule, k):
    graph = make_graph(RULES[rule](), k)
    edges = top_k(TRAINED.tolist(), k)
    assert graph.real_index.tolist() == edges
    assert torch.equal(graph.candidates.weight.detach(), STARTS[rule])
    assert torch.equal(graph.edge_weight, STARTS[rule][edges])
    train(graph)
    for mode in (True, False):
        graph.train(mode)(X)
        assert graph.real_index.tolist() == edges
    assert not torch.equal(graph.edge_weight, STARTS[rule][edges])


def test_ties_go_to_the_lower_index():
    trained = torch.tensor([0.5, -0.5, 0.1, 0.5] * 6 + [0.5, -0.5])
    assert make_graph(FineTune(trained)).real_index.tolist() == top_k(trained.tolist(), K)


@pytest.mark.parametrize("rule", RULES)
def test_the_given_weights_are_copied(rule):
    trained, initial = TRAINED.clone(), INITIAL.clone()
    wiring = LotteryTicket(trained, initial) if rule == "lottery_ticket" else FineTune(trained)
    for weight in (trained, initial):
        weight.zero_()
    graph = make_graph(wiring)
    assert torch.equal(graph.candidates.weight.detach(), STARTS[rule])
    train(graph)
    graph.rewire(wiring, K)
    assert torch.equal(graph.candidates.weight.detach(), STARTS[rule])


@pytest.mark.parametrize("rule", RULES)
def test_another_number_of_edges_by_rewire(rule):
    graph = make_graph(RULES[rule]())
    train(graph)
    graph.rewire(RULES[rule](), 4)
    assert graph.real_index.tolist() == top_k(TRAINED.tolist(), 4)
    assert torch.equal(graph.candidates.weight.detach(), STARTS[rule])


@pytest.mark.parametrize("rule", RULES)
def test_reset_goes_back_to_the_beginning_of_the_second_stage(rule):
    graph = make_graph(RULES[rule]())
    train(graph)
    graph.reset_parameters()
    assert graph.real_index.tolist() == top_k(TRAINED.tolist(), K)
    assert torch.equal(graph.candidates.weight.detach(), STARTS[rule])


@pytest.mark.parametrize("rule", ["lottery_ticket", "fine_tune"])
def test_without_weights_it_waits_for_a_checkpoint(rule, tmp_path):
    graph = make_graph(RULES[rule]())
    train(graph)
    torch.save(graph.state_dict(), tmp_path / "graph.pt")
    waiting = make_graph(rule)
    looks = (
        lambda: waiting(X),
        lambda: waiting.eval()(X),
        lambda: waiting.real_index,
        lambda: waiting.to_data(),
        lambda: cost(waiting, (3, 4, 4)),
    )
    for look in looks:
        with pytest.raises(InputError, match=f"stage2: {type(waiting.wiring).__name__} needs a trained") as error:
            look()
        assert "\n" not in str(error.value)
    waiting.load_state_dict(torch.load(tmp_path / "graph.pt", weights_only=True))
    assert torch.equal(waiting.real_index, graph.real_index)
    assert torch.equal(waiting.eval()(X), graph.eval()(X))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FineTune(TRAINED[:-1]),
        lambda: LotteryTicket(TRAINED, INITIAL[:-1]),
        lambda: LotteryTicket(TRAINED[:-1], INITIAL),
    ],
)
def test_weights_of_another_graph_are_refused_and_change_nothing(make, unchecked):
    wiring, graph = make(), make_graph("dnw")
    before = graph.candidates.weight.detach().clone()
    with pytest.raises(InputError, match=r"stage2: .* was given \[25\] weights for 26 candidates"):
        graph.rewire(wiring, 4)
    assert torch.equal(graph.candidates.weight.detach(), before)
    assert graph.num_edges == K
    graph(X)
    assert graph.real_index.tolist() == top_k(before.tolist(), K)


def test_trained_weights_that_are_no_numbers_are_refused():
    trained = TRAINED.clone()
    trained[3] = float("nan")
    with pytest.raises(InputError, match="stage2: 1 of 26 candidate weights are NaN or infinite"):
        make_graph(FineTune(trained))


def test_what_is_no_tensor_is_refused(unchecked):
    for make in (FineTune, LotteryTicket):
        with pytest.raises(
            InputError, match="trained must be a tensor Float\\[Tensor, 'candidates'\\] or None; got 'runs/1'"
        ):
            make("runs/1")


def test_dynamic_graphs():
    trained = torch.randn(36)
    graph = NeuralGraph(
        num_nodes=6, num_inputs=3, num_outputs=2, num_edges=K, dynamics=Discrete(2), wiring=FineTune(trained)
    )
    graph(X)
    assert graph.real_index.tolist() == top_k(trained.tolist(), K)
