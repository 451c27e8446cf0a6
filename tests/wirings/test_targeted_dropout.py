import math
import subprocess
import sys

import pytest
import torch
from pairs import every_pair
from reference import top_k
from step_loops import attached
from torch import nn
from torch.utils.checkpoint import checkpoint

from dnw_graph import CandidateEdges, Discrete, InputError, NeuralGraph, Schedule, TargetedDropout

X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
SIZES, K, N = (3, 4, 2), 9, 26


def make_graph(wiring, k=K, **options):
    return NeuralGraph(SIZES, k, wiring=wiring, node_function=nn.Tanh(), **{"name": "stage2", **options})


def masks(graph, steps):
    """The real edges of so many forward passes in training, the weights unchanged."""
    seen = []
    hook = graph.propagation.register_forward_hook(
        lambda module, args, output: seen.append(set(args[0].index.tolist()))
    )
    step = attached(graph)
    with torch.no_grad():
        for _ in range(steps):
            graph(X)
            step()
    hook.remove()
    return seen


def draw(graph, steps):
    """The same without the forward passes, for many steps."""
    seen = []
    for _ in range(steps):
        seen.append(set(graph.wiring.choose_to_train(graph.view()).tolist()))
        graph.wiring.step += 1
    return seen


def kept_per_node(graph):
    """What stays of every node: all but its ⌊γ · fan-in⌋ edges of smallest |w|, ties to the lower index."""
    weights = graph.candidates.weight.tolist()
    targets = graph.candidates.pairs(torch.arange(graph.num_candidates))[1].tolist()
    kept = []
    for node in set(targets):
        into = [i for i, target in enumerate(targets) if target == node]
        dropped = math.floor((1 - graph.num_edges / graph.num_candidates) * len(into) + 1e-9)
        kept += sorted(into, key=lambda i: (-abs(weights[i]), i))[: len(into) - dropped]
    return sorted(kept)


def candidates_in_pieces():
    """A dynamic graph of 9 nodes: into 3 … 6 from two blocks of sources that lie apart, into 7 and 8 from one."""
    blocks = [(range(3), range(3, 7)), (range(2, 7), range(7, 9)), (range(4, 9), range(3, 7))]
    return CandidateEdges(blocks, num_nodes=9)


def pieces(wiring, k):
    return NeuralGraph(
        num_nodes=9,
        num_inputs=3,
        num_outputs=2,
        num_edges=k,
        dynamics=Discrete(2),
        candidates=candidates_in_pieces(),
        wiring=wiring,
    )


@pytest.mark.parametrize("k", [1, K, 25, 26])
def test_evaluation_keeps_the_k_strongest_of_the_graph(k):
    graph = make_graph(TargetedDropout(0.5), k).eval()
    graph.candidates.weight.data[5:12] = -graph.candidates.weight.data[4]  # ties
    graph(X)
    assert graph.real_index.tolist() == top_k(graph.candidates.weight.tolist(), k)


@every_pair(make=[make_graph, pieces], k=[1, 2, 9, 13, 20, 25, 26], ties=[False, True])
def test_regular_evaluation_keeps_the_strongest_of_every_node(make, k, ties):
    graph = make(TargetedDropout(0.5, "regular"), k).eval()
    if ties:
        weight = graph.candidates.weight.data
        weight.copy_((weight * 6).round() / 6)
    graph(X)
    kept = graph.real_index.tolist()
    assert kept == kept_per_node(graph)
    assert graph.num_real_edges == len(kept) >= k
    assert set(graph.edge_index[1].tolist()) == set(range(3, 9))  # every node keeps an edge
    assert torch.equal(graph.edge_weight, graph.candidates.weight.detach()[kept])


@pytest.mark.parametrize("fan_in", [3, 7, 10, 49])
def test_regular_counts_are_exact_where_gamma_times_fan_in_is_whole(fan_in):
    # One node: γ · fan-in = fan-in - k exactly, whatever 1 - k / fan-in is in floating point.
    for k in range(1, fan_in + 1):
        graph = NeuralGraph((fan_in, 1), k, wiring=TargetedDropout(0.5, "regular"))
        assert graph.num_real_edges == k


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["unconstrained", "regular"])
@pytest.mark.parametrize("rho", [0.1, 0.5, 0.95])
def test_each_target_is_dropped_with_probability_rho_and_nothing_else_ever(variant, rho):
    graph = make_graph(TargetedDropout(rho, variant))
    stay = set(graph.real_index.tolist())
    rounds = 4000
    seen = draw(graph, rounds)
    assert all(stay <= edges for edges in seen)
    targets = sorted(set(range(N)) - stay)
    dropped = torch.tensor([[target not in edges for target in targets] for edges in seen]).double()
    deviation = math.sqrt(rho * (1 - rho) / rounds)
    assert (dropped.mean(dim=0) - rho).abs().max() < 4.5 * deviation
    # Masks of different edges, and of one edge in consecutive steps, do not depend on one another.
    noise = (dropped - rho) / math.sqrt(rho * (1 - rho))
    together = noise.t() @ noise / rounds
    together.fill_diagonal_(0)
    following = (noise[1:] * noise[:-1]).mean(dim=0)
    assert torch.cat([together.flatten(), following]).abs().max() < 5.5 / math.sqrt(rounds)


@pytest.mark.parametrize(("rho", "expected"), [(0.0, N), (1.0, K)])
def test_the_ends_of_rho_are_exact(rho, expected):
    assert {len(edges) for edges in masks(make_graph(TargetedDropout(rho)), 50)} == {expected}


@pytest.mark.slow
def test_rho_may_be_gamma():
    graph = make_graph(TargetedDropout("gamma"), 20)
    stays = sum(map(len, draw(graph, 2000))) - 2000 * 20
    gamma, draws = 6 / 26, 2000 * 6
    assert abs(stays / draws - (1 - gamma)) < 4.5 * math.sqrt(gamma * (1 - gamma) / draws)
    everything = make_graph(TargetedDropout("gamma"), N)
    assert masks(everything, 3) == [set(range(N))] * 3


def test_rho_may_follow_a_schedule():
    graph = make_graph(TargetedDropout(Schedule(0.0, 1.0, 100, 200)))
    counts = [len(edges) for edges in draw(graph, 302)]
    assert counts[:101] == [N] * 101
    assert counts[200:] == [K] * 102
    middle = counts[135:166]  # ρ from 0.35 to 0.65, one half on average
    assert abs(sum(middle) / len(middle) - (K + 0.5 * (N - K))) < 4.5 * math.sqrt((N - K) / 4 / len(middle))


def test_targets_follow_the_weights():
    graph = make_graph(TargetedDropout(1.0))
    for _ in range(3):
        graph.candidates.weight.data.copy_(torch.randn(N))
        assert masks(graph, 1) == [set(top_k(graph.candidates.weight.tolist(), K))]


@pytest.mark.parametrize("propagation", ["block", "message_passing"])
@pytest.mark.parametrize("training", [True, False])
def test_what_stays_keeps_its_weight_and_sign(training, propagation):
    graph = NeuralGraph((5, 3), 6, wiring=TargetedDropout(0.5), input_function=False, propagation=propagation).double()
    graph.train(training)
    graph.candidates.weight.data[::2] *= -1
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(5):
        seen = []
        hook = graph.propagation.register_forward_hook(lambda module, args, out, seen=seen: seen.extend(args[0].index))
        out = graph(x)
        hook.remove()
        weight = graph.candidates.weight.tolist()
        matrix = [[weight[5 * v + u] if 5 * v + u in seen else 0.0 for u in range(5)] for v in range(3)]
        torch.testing.assert_close(out, x @ torch.tensor(matrix, dtype=torch.float64).T, rtol=1e-12, atol=1e-12)
        assert min(map(min, matrix)) < 0 < max(map(max, matrix))


def fix_weights(graph):
    graph.candidates.weight.data.copy_(torch.linspace(-1, 1, N))


def fixed_sequence(**options):
    torch.manual_seed(options.pop("seed", 11))
    graph = make_graph(TargetedDropout(0.5), **options)
    fix_weights(graph)
    return masks(graph, 6)


def test_all_forward_passes_of_a_step_have_one_mask():
    graph = make_graph(TargetedDropout(0.5))
    step = attached(graph)
    seen = []
    graph.propagation.register_forward_hook(lambda module, args, output: seen.append(args[0].index.tolist()))
    for _ in range(3):
        graph(X)
        graph(X)
        step()
    assert seen[::2] == seen[1::2]
    assert len(set(map(tuple, seen))) == 3


def test_a_constant_rho_draws_new_masks_without_attach():
    graph = make_graph(TargetedDropout(0.5))
    seen = []
    graph.propagation.register_forward_hook(lambda module, args, output: seen.append(frozenset(args[0].index.tolist())))
    for _ in range(6):
        graph(X).sum().backward()
    assert len(set(seen)) == 6
    assert graph.state_dict()["wiring.step"] == 6


def test_graphs_of_one_name_drop_different_edges_without_attach():
    def drawn(seed):
        torch.manual_seed(seed)
        graphs = [make_graph(TargetedDropout(0.5)) for _ in range(2)]
        for graph in graphs:
            fix_weights(graph)
        return [draw(graph, 6) for graph in graphs]

    first, second = drawn(11)
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert drawn(11) == [first, second]
    assert all(a != b for a, b in zip(first, drawn(12)[0], strict=True))


def test_the_rule_draws_no_number_when_a_graph_is_created():
    states = []
    for wiring in ("dnw", TargetedDropout(0.5)):
        torch.manual_seed(11)
        graph = make_graph(wiring)
        states.append((graph.candidates.weight.tolist(), torch.get_rng_state().tolist()))
    assert states[0] == states[1]


def test_masks_are_a_function_of_seed_graph_and_step():
    first = fixed_sequence()
    assert fixed_sequence() == first
    assert len(set(map(frozenset, first))) == 6
    for other in (fixed_sequence(seed=12), fixed_sequence(name="stage3")):
        assert all(a != b for a, b in zip(first, other, strict=True))


def test_drawing_masks_leaves_the_generator_alone():
    graph = make_graph(TargetedDropout(0.5))
    state = torch.get_rng_state()
    graph(X)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_that_of_pytorch_decides():
    sequences = []
    for seed, draws in ((4, 0), (4, 3), (5, 0)):
        torch.manual_seed(seed)
        torch.rand(draws)
        graph = make_graph(TargetedDropout(0.5))
        fix_weights(graph)
        sequences.append(masks(graph, 6))
    assert sequences[0] == sequences[1]
    assert all(a != b for a, b in zip(sequences[0], sequences[2], strict=True))


@pytest.mark.slow
def test_masks_are_the_same_in_another_process():
    program = (
        "import torch\n"
        "from dnw_graph import NeuralGraph, TargetedDropout, attach\n"
        "torch.manual_seed(11)\n"
        f"graph = NeuralGraph({SIZES}, {K}, wiring=TargetedDropout(0.5), name='stage2')\n"
        f"graph.candidates.weight.data.copy_(torch.linspace(-1, 1, {N}))\n"
        "graph.propagation.register_forward_hook(lambda module, args, output: print(args[0].index.tolist()))\n"
        "optimiser = torch.optim.SGD(graph.parameters(), 0.0)\n"
        "attach(graph, optimiser)\n"
        "[(graph(torch.zeros(1, 3, 4, 4)), optimiser.step()) for _ in range(6)]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [set(map(int, line[1:-1].split(","))) for line in done.stdout.splitlines()] == fixed_sequence()


@pytest.mark.parametrize("variant", ["unconstrained", "regular"])
def test_looking_changes_nothing(variant):
    def look(graph):
        stay = graph.real_index.tolist()
        assert graph.edge_index.size(1) == len(graph.edge_weight) == graph.num_real_edges == len(stay)
        assert graph.to_data().num_edges == len(stay)
        graph.live_nodes()
        graph.update_wiring()
        graph.eval()(X)
        assert graph.real_index.tolist() == stay
        graph.train()

    looked_at, left_alone = (make_graph(TargetedDropout(0.5, variant)) for _ in range(2))
    left_alone.load_state_dict(looked_at.state_dict())
    for _ in range(6):
        look(looked_at)
        assert masks(looked_at, 1) == masks(left_alone, 1)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("propagation", ["block", "message_passing"])
def test_recomputation_uses_the_mask_of_its_forward_pass(use_reentrant, propagation):
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(
            make_graph(TargetedDropout(0.5), propagation=propagation),
            NeuralGraph((2, 5), 4, wiring=TargetedDropout(0.7), propagation=propagation),
        )
        step = attached(model)
        for _ in range(3):
            model.zero_grad()
            x = X.clone().requires_grad_()
            out = checkpoint(model, x, use_reentrant=use_reentrant) if recomputed else model(x)
            model[0].edge_index  # noqa: B018  # a look between the passes
            (out**2).sum().backward()
            gradients.append([x.grad, *(graph.candidates.weight.grad.clone() for graph in model)])
            step()
    torch.testing.assert_close(gradients[:3], gradients[3:])
    assert not torch.equal(gradients[0][1], gradients[1][1])


@pytest.mark.parametrize("variant", ["unconstrained", "regular"])
def test_weights_that_are_no_numbers_are_refused(variant):
    graph = make_graph(TargetedDropout(0.5, variant))
    graph.candidates.weight.data[4] = float("nan")
    for mode in (True, False):
        with pytest.raises(InputError, match="stage2: 1 of 26 candidate weights are NaN or infinite"):
            graph.train(mode)(X)


OVERLAPS = {
    "partly": [(range(3), range(3, 7)), (range(3, 5), range(5, 9))],
    "within": [(range(3), range(3, 9)), (range(3, 5), range(4, 6))],
    "not beside": [(range(3), range(3, 7)), (range(3), range(7, 9)), (range(3, 5), range(6, 7))],
}


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_regular_refuses_targets_that_overlap_in_part(overlap):
    def graph(variant):
        return NeuralGraph(
            num_nodes=9,
            num_inputs=3,
            num_outputs=2,
            num_edges=9,
            dynamics=Discrete(2),
            candidates=CandidateEdges(OVERLAPS[overlap], num_nodes=9),
            wiring=TargetedDropout(0.5, variant),
        )

    with pytest.raises(InputError, match="must have the same targets or none in common"):
        graph("regular")
    assert graph("unconstrained").num_real_edges == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 1.5}, "rho must be a share within 0 … 1; got 1.5"),
        ({"rho": -0.1}, "rho must be 0 or more; got -0.1"),
        ({"rho": Schedule(0.5, 1.1)}, "rho must be a share within 0 … 1; got Schedule"),
        ({"rho": "gama"}, "rho must be a number in 0 … 1, 'gamma' or a schedule; got 'gama'"),
        ({"rho": float("nan")}, "rho must be a finite number"),
        ({"variant": "unconstraint"}, "unknown variant of targeted dropout 'unconstraint': did you mean 'unconst"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, unchecked):
    with pytest.raises(InputError) as error:
        TargetedDropout(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
