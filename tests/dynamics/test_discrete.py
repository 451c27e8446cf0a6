import copy
from functools import partial

import networkx as nx
import pytest
import torch
from dynamic_reference import (
    Timed,
    all_pairs,
    dense_adjacency,
    plain_discrete,
    plain_norm,
    plain_norm_relu_conv,
    plain_relu_conv,
    plain_timed,
    summed_gradient,
)
from pairs import every_pair
from reference import relative_error
from torch import nn
from torch_geometric.utils import to_networkx

from dnw_graph import CandidateEdges, Discrete, InputError, NeuralGraph
from dnw_graph.node_functions import NormReluConv, ReluConvSendNorm
from dnw_graph.propagation import BlockPropagation, MessagePassingPropagation

N, INPUTS, OUTPUTS, K, STEPS = 9, 3, 2, 30, 4
PAIRS = all_pairs(N)
PROPAGATIONS = {
    "block": BlockPropagation(),
    "edge_index": MessagePassingPropagation("edge_index"),
    "csr": MessagePassingPropagation("csr"),
}
FUNCTIONS = {
    "tanh": lambda n: nn.Tanh(),
    "timed": Timed,
    "instance": partial(NormReluConv, norm="instance"),
    "batch": partial(NormReluConv, norm="batch"),
    "send_instance": partial(ReluConvSendNorm, norm="instance"),
    "send_batch": partial(ReluConvSendNorm, norm="batch"),
}
# (what happens before sending, what happens to what is received), by name
PLAIN = {
    "tanh": (None, lambda p, z, step: z.tanh()),
    "timed": (None, plain_timed),
    "instance": (None, lambda p, z, step: plain_norm_relu_conv(p, "instance", z)),
    "batch": (None, lambda p, z, step: plain_norm_relu_conv(p, "batch", z)),
    "send_instance": (lambda p, z, step: plain_relu_conv(p, z), lambda p, z, step: plain_norm(p, "instance", z)),
    "send_batch": (lambda p, z, step: plain_relu_conv(p, z), lambda p, z, step: plain_norm(p, "batch", z)),
}


def make_graph(dynamics, function="tanh", **options):
    options = {"num_nodes": N, "num_inputs": INPUTS, "num_outputs": OUTPUTS, "num_edges": K} | options
    function = FUNCTIONS.get(function, function)
    graph = NeuralGraph(dynamics=dynamics, node_function=function, **options).double()
    with torch.no_grad():
        for p in graph.dynamics.parameters():
            p.uniform_(-1, 1)  # scales and shifts that are not 1 and 0
    return graph


@pytest.fixture
def maps(digits):
    """Inputs [2, 3, 8, 8]."""
    return digits[0][:6].view(2, INPUTS, 8, 8)


@pytest.fixture
def sequence(digits):
    """Inputs at 4 steps [2, 4, 3, 8, 8]."""
    return digits[0][:24].view(2, STEPS, INPUTS, 8, 8)


def gradients(outputs, x, parameters):
    """Gradients of a loss that is not linear in the outputs."""
    return torch.autograd.grad((outputs**3 + outputs).sum(), [x, *parameters])


def compare_with_plain_loop(graph, function, x, input_mode="initial", steps=STEPS, real_only=False):
    """Outputs, all states and all gradients of a graph against the plain loop."""
    x = x.clone().requires_grad_()
    matrix = dense_adjacency(N, PAIRS, graph.candidates.weight, graph.num_edges)
    plain_parameters = [
        {name: p.detach().clone().requires_grad_() for name, p in f.named_parameters()}
        for f, _ in graph.dynamics.functions()
    ]
    before, after = PLAIN[function]

    def of_step(step):
        return plain_parameters[step % len(plain_parameters)]

    states, sent, offsets = plain_discrete(
        x,
        matrix,
        steps,
        lambda z, step: after(of_step(step), z, step),
        input_mode,
        before and (lambda z, step: before(of_step(step), z, step)),
    )
    outputs = states[-1][:, N - OUTPUTS :]
    found = graph(x)
    assert relative_error(found, outputs) < 1e-10
    assert relative_error(graph(x, return_states=True), torch.stack(states, dim=1)) < 1e-10

    found_gradients = gradients(found, x, graph.parameters())
    (outputs**3 + outputs).sum().backward()
    by_hand = torch.tensor([summed_gradient(sent, offsets, u, v) for u, v in PAIRS], dtype=x.dtype)
    if real_only:
        by_hand[[matrix[v, u] == 0 for u, v in PAIRS]] = 0
    expected = {"candidates.weight": by_hand}
    for number, plain in enumerate(plain_parameters):
        expected |= {f"dynamics.node_functions.{number}.{name}": p.grad for name, p in plain.items()}
    assert relative_error(found_gradients[0], x.grad) < 1e-10
    names = [name for name, _ in graph.named_parameters()]
    assert set(names) == set(expected)
    for name, gradient in zip(names, found_gradients[1:], strict=True):
        assert relative_error(gradient, expected[name]) < 1e-10, name
        assert gradient.abs().max() > 0, name
    return by_hand


@every_pair(
    rest=pytest.mark.slow,
    function=FUNCTIONS,
    input_mode=["initial", "hold", "sequence"],
    propagation=PROPAGATIONS,
)
def test_equation_11_and_all_gradients_by_a_plain_loop(function, input_mode, propagation, maps, sequence):
    steps = None if input_mode == "sequence" else STEPS
    graph = make_graph(Discrete(steps, input_mode=input_mode), function, propagation=PROPAGATIONS[propagation])
    x = sequence if input_mode == "sequence" else maps
    gradient = compare_with_plain_loop(graph, function, x, input_mode)
    hallucinated = torch.ones(N * N, dtype=torch.bool)
    hallucinated[graph.real_index] = False
    assert (gradient[hallucinated] != 0).any()


@pytest.mark.parametrize("input_mode", ["initial", "hold", "sequence"])
@pytest.mark.parametrize("function", ["tanh", "timed"])
def test_nodes_may_hold_single_values(function, input_mode, maps, sequence):
    x = sequence[..., 3, 4] if input_mode == "sequence" else maps[..., 3, 4]
    graph = make_graph(Discrete(None if input_mode == "sequence" else STEPS, input_mode=input_mode), function)
    compare_with_plain_loop(graph, function, x, input_mode)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_random_graphs_get_the_gradient_of_their_edges_only(propagation, maps):
    graph = make_graph(Discrete(STEPS), wiring="random_graph", propagation=PROPAGATIONS[propagation])
    gradient = compare_with_plain_loop(graph, "tanh", maps, real_only=True)
    assert int((gradient != 0).sum()) <= K


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_few_steps(function, steps, maps):
    # Every step is the first or the last one. With one step only 3 × 2 candidates can have a gradient.
    graph = make_graph(Discrete(steps), function, num_edges=60)
    gradient = compare_with_plain_loop(graph, function, maps, steps=steps).view(N, N)
    if steps == 1:
        assert (gradient[N - OUTPUTS :, :INPUTS] != 0).any()
        assert not gradient[: N - OUTPUTS].any()
        assert not gradient[:, INPUTS:].any()


@pytest.mark.parametrize("input_mode", ["initial", "hold"])
@pytest.mark.parametrize("function", ["timed", "instance", "batch", "send_instance"])
def test_a_function_of_its_own_at_every_step(function, input_mode, maps):
    graph = make_graph(Discrete(STEPS, input_mode=input_mode, function_per_step=True), function)
    assert len(graph.dynamics.functions()) == STEPS
    first, second = (next(f.parameters()) for f, _ in graph.dynamics.functions()[:2])
    assert not torch.equal(first, second)
    compare_with_plain_loop(graph, function, maps, input_mode)


def test_one_sequence_may_be_longer_than_another(sequence):
    graph = make_graph(Discrete(input_mode="sequence"))
    for steps in (1, 2, STEPS):
        compare_with_plain_loop(graph, "tanh", sequence[:, :steps], "sequence", steps=steps)


def test_all_nodes_may_be_inputs_and_outputs(maps):
    graph = make_graph(Discrete(3), num_inputs=N, num_outputs=N)
    x = torch.randn(2, N, 3, 3, dtype=torch.float64)
    matrix = dense_adjacency(N, PAIRS, graph.candidates.weight, K)
    states, _, _ = plain_discrete(x, matrix, 3, lambda z, step: z.tanh())
    assert relative_error(graph(x), states[-1]) < 1e-12


def one_way(pairs, num_nodes, **options):
    """A graph without node functions in which the given weights are the only edges."""
    graph = NeuralGraph(
        num_nodes=num_nodes, num_edges=len(pairs), node_function=nn.Identity(), **{"num_outputs": num_nodes} | options
    ).double()
    graph.candidates.weight.data.zero_()
    for (u, v), weight in pairs.items():
        graph.candidates.weight.data[v * num_nodes + u] = weight
    return graph


def test_self_loop_by_hand():
    graph = one_way({(0, 0): -0.5}, 1, num_inputs=1, dynamics=Discrete(3))
    x = torch.tensor([[4.0]], dtype=torch.float64)
    out = graph(x)
    assert out.item() == 4 * (-0.5) ** 3
    out.backward()
    assert graph.candidates.weight.grad.item() == 4 * 3 * (-0.5) ** 2


def test_cycle_by_hand():
    # 0 → 1 with 2, 1 → 0 with 3: what starts at 0 is back after two steps, six times as large.
    graph = one_way({(0, 1): 2.0, (1, 0): 3.0}, 2, num_inputs=1, dynamics=Discrete(4))
    states = graph(torch.tensor([[1.0]], dtype=torch.float64), return_states=True)
    assert states[0].tolist() == [[1, 0], [0, 2], [6, 0], [0, 12], [36, 0]]


def test_cycles_and_self_loops_are_candidates_by_default():
    graph = make_graph(Discrete(6), nn.Identity(), num_edges=N * N)
    assert graph.num_candidates == N * N
    network = to_networkx(graph.to_data())
    assert nx.number_of_selfloops(network) == N
    assert not nx.is_directed_acyclic_graph(network)


def test_a_graph_over_static_candidates_has_no_cycles():
    sizes = (3, 2, 2, 2)  # the longest path has three edges, so after four steps all that started at the inputs is gone
    graph = make_graph(Discrete(4), nn.Identity(), candidates=CandidateEdges.static(sizes), num_outputs=N)
    assert nx.is_directed_acyclic_graph(to_networkx(graph.to_data()))
    states = graph(torch.randn(2, INPUTS, dtype=torch.float64), return_states=True)
    assert states[:, 3].any()
    assert not states[:, 4].any()


class Recording(BlockPropagation):
    """Notes how many sources are sent from and how many targets are computed for."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, edges, x):
        plain = super().forward(edges, x)

        def product(number, z, rows, columns):
            received = plain.product(number, z, rows, columns)
            self.sizes.append((z.size(1), received.size(1)))
            return received

        recording = copy.copy(plain)
        recording.product = product
        return recording


def sizes_of(dynamics, function, x, **options):
    """Sources and targets of every product, and nodes at every call of the node function."""
    calls = []
    graph = make_graph(dynamics, function, propagation=Recording())
    for f, _ in graph.dynamics.functions():
        f.register_forward_pre_hook(lambda module, args: calls.append(args[0].size(1)))
    graph(x, **options)
    return graph.propagation.sizes, calls


@pytest.mark.parametrize("function", ["instance", "send_instance"])
@pytest.mark.parametrize("input_mode", ["initial", "hold", "sequence"])
def test_the_first_and_the_last_step_are_cut_to_what_matters(function, input_mode, maps, sequence):
    dynamics = Discrete(None if input_mode == "sequence" else STEPS, input_mode=input_mode)
    x = sequence if input_mode == "sequence" else maps
    sizes, calls = sizes_of(dynamics, function, x)
    assert sizes == [(INPUTS, N), (N, N), (N, N), (N, OUTPUTS)]
    assert calls == [N, N, N, OUTPUTS]
    sizes, calls = sizes_of(dynamics, function, x, return_states=True)
    assert sizes == [(INPUTS, N), (N, N), (N, N), (N, N)]
    assert calls == [N] * 4


def test_what_cannot_be_cut_is_not(maps):
    # A batch norm works on all nodes at once; what it sends is computed from all nodes as well.
    assert sizes_of(Discrete(2), "batch", maps)[0] == [(INPUTS, N), (N, N)]
    assert sizes_of(Discrete(2), "send_batch", maps)[0] == [(N, N), (N, N)]
    assert sizes_of(Discrete(1), "instance", maps) == ([(INPUTS, OUTPUTS)], [OUTPUTS])


class Everywhere(NormReluConv):
    node_wise = False


class SendEverywhere(ReluConvSendNorm):
    node_wise = False


@pytest.mark.parametrize(("cut", "whole"), [(NormReluConv, Everywhere), (ReluConvSendNorm, SendEverywhere)])
@pytest.mark.parametrize("input_mode", ["initial", "hold"])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_the_cuts_change_neither_outputs_nor_gradients(cut, whole, input_mode, propagation, maps):
    results = []
    for function in (cut, whole):
        torch.manual_seed(1)
        graph = make_graph(
            Discrete(3, input_mode=input_mode),
            partial(function, norm="instance"),
            propagation=PROPAGATIONS[propagation],
        )
        x = maps.clone().requires_grad_()
        last = graph(x, return_states=True)[:, -1, N - OUTPUTS :]
        for out in (graph(x), last):
            results.append((out, *gradients(out, x, graph.parameters())))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert relative_error(a, b) < 1e-12


def centred(z):
    return z - z.mean(1, keepdim=True)


class Centred(NormReluConv):
    def forward(self, z):
        return centred(super().forward(z))


class CentredParts(NormReluConv):
    def forward(self, z, nodes=None):
        return centred(super().forward(z, nodes))


class SendsCentred(ReluConvSendNorm):
    def send(self, z, nodes=None):
        return centred(super().send(z, nodes))


class ReceivesCentred(ReluConvSendNorm):
    def forward(self, z, nodes=None):
        return centred(super().forward(z, nodes))


class AlsoSends(NormReluConv):
    def send(self, z):
        return centred(z)


def conv_of_norm(p, z):
    return plain_norm_relu_conv(p, "instance", z)


# (what happens before sending, what happens to what is received)
OVERRIDING = {
    Centred: (None, lambda p, z: centred(conv_of_norm(p, z))),
    CentredParts: (None, lambda p, z: centred(conv_of_norm(p, z))),
    SendsCentred: (lambda p, z: centred(plain_relu_conv(p, z)), lambda p, z: plain_norm(p, "instance", z)),
    ReceivesCentred: (plain_relu_conv, lambda p, z: centred(plain_norm(p, "instance", z))),
    AlsoSends: (lambda p, z: centred(z), conv_of_norm),
    NormReluConv: (None, lambda p, z: centred(conv_of_norm(p, z))),  # replaced on the object
}


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("function", OVERRIDING)
def test_functions_that_mix_nodes_are_applied_to_all(function, propagation, maps):
    graph = make_graph(Discrete(2), partial(function, norm="instance"), propagation=PROPAGATIONS[propagation])
    own = graph.dynamics.node_functions[0]
    if function is NormReluConv:
        own.forward = lambda z, nodes=None: centred(NormReluConv.forward(own, z, nodes))
    p = {name: value.detach() for name, value in own.named_parameters()}
    send, receive = OVERRIDING[function]
    matrix = dense_adjacency(N, PAIRS, graph.candidates.weight, K)
    before = None if send is None else lambda z, _: send(p, z)
    states, _, _ = plain_discrete(maps, matrix, 2, lambda z, _: receive(p, z), send=before)
    assert relative_error(graph(maps), states[-1][:, N - OUTPUTS :]) < 1e-10


def test_states_that_nobody_reads_are_not_made(maps, monkeypatch):
    calls, pass_on = [], ReluConvSendNorm.pass_on
    monkeypatch.setattr(ReluConvSendNorm, "pass_on", lambda self, z: (calls.append(1), pass_on(self, z))[1])
    graph = make_graph(Discrete(3), "send_batch")
    graph(maps)
    assert len(calls) == 2
    seen = []
    graph.dynamics.node_functions[0].register_forward_hook(lambda *args: seen.append(args))
    graph(maps)
    assert (len(calls), len(seen)) == (2, 3)
    make_graph(Discrete(3, input_mode="hold"), "send_batch")(maps)
    make_graph(Discrete(3, function_per_step=True), "send_batch")(maps)
    assert len(calls) == 2


def test_the_edges_are_chosen_once_per_forward_pass(maps):
    graph = make_graph(Discrete(STEPS))
    choose, calls = graph.wiring.choose, []
    graph.wiring.choose = lambda *args: calls.append(1) or choose(*args)
    graph(maps)
    assert len(calls) == 1


@pytest.mark.parametrize("steps", [0, -1, 2.5, "3", None])
def test_steps_must_be_an_integer_from_one_up(steps, unchecked):
    with pytest.raises(InputError, match=r"steps must be an integer( or None| >= 1); got"):
        Discrete(steps)


def test_a_sequence_brings_its_own_steps():
    with pytest.raises(InputError, match="takes as many steps as the input has: leave out steps"):
        Discrete(3, input_mode="sequence")
    with pytest.raises(InputError, match="leave out steps and function_per_step"):
        Discrete(input_mode="sequence", function_per_step=True)


def test_unknown_input_modes_come_with_near_ones():
    with pytest.raises(InputError, match="unknown input mode 'held': did you mean 'hold'"):
        Discrete(3, input_mode="held")


def test_a_ready_module_cannot_be_one_per_step():
    with pytest.raises(InputError, match="function_per_step needs a name or a factory as node_function"):
        make_graph(Discrete(3, function_per_step=True), nn.Tanh())


def test_inputs_of_another_shape_are_refused():
    x = torch.zeros(2, 4, 5, 5, dtype=torch.float64)
    with pytest.raises(InputError, match=r"the input must be .* \[batch, 3, …\] .*got .* \[2, 4, 5, 5\]"):
        make_graph(Discrete(3))(x)
    graph = make_graph(Discrete(input_mode="sequence"))
    for shape in [(2, INPUTS), (2, 4, 5), (2, INPUTS, 5, 5)]:
        with pytest.raises(InputError, match=r"the input must be .* \[batch, time, 3, …\]"):
            graph(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(InputError, match=r"graph: the sequence has no elements: \[2, 0, 3\]"):
        graph(torch.zeros(2, 0, INPUTS, dtype=torch.float64))


def test_unknown_options_are_refused(maps):
    with pytest.raises(
        InputError, match="unknown options times; known are return_states, initial_states and first_step"
    ):
        make_graph(Discrete(3))(maps, times=[1.0])


def test_the_name_alone_says_what_is_missing():
    with pytest.raises(InputError, match=r"give dynamics=Discrete\(steps=…\) instead of its name"):
        NeuralGraph(num_nodes=9, num_inputs=3, num_outputs=2, num_edges=9, dynamics="discrete")


@pytest.mark.parametrize("function", PLAIN)
def test_a_sequence_goes_on_where_it_ended(function, sequence):
    graph = make_graph(Discrete(input_mode="sequence"), function)
    whole = graph(sequence, return_states=True)
    start = torch.rand_like(whole[:, 0])
    for first in (1, 3):
        states = graph(sequence[:, first:], return_states=True, initial_states=whole[:, first], first_step=first)
        assert relative_error(states[:, 1:], whole[:, first + 1 :]) < 1e-12
        outputs = graph(sequence[:, first:], initial_states=whole[:, first], first_step=first)
        assert relative_error(outputs, whole[:, -1, N - OUTPUTS :]) < 1e-12
        other = graph(sequence[:, first:], initial_states=start, first_step=first)
        assert relative_error(other, outputs) > 1e-3


def test_states_and_steps_that_cannot_be_are_refused(maps):
    graph = make_graph(Discrete(STEPS))
    with pytest.raises(InputError, match=r"initial_states must be a tensor of torch.float64 \[2, 9, 8, 8\] on cpu"):
        graph(maps, initial_states=maps)
    with pytest.raises(InputError, match=r"first_step must be 0 or more; got -1"):
        graph(maps, first_step=-1)
