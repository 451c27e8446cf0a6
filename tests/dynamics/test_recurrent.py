import math
from functools import partial

import pytest
import torch
from dynamic_reference import (
    Changed,
    all_pairs,
    dense_adjacency,
    euler,
    plain_discrete,
    plain_norm,
    plain_norm_relu_conv,
    plain_relu_conv,
    product,
    summed_gradient,
)
from reference import relative_error
from torch import nn

from dnw_graph import CandidateEdges, Continuous, Discrete, InputError, NeuralGraph
from dnw_graph.dynamics.recurrent import takes_time
from dnw_graph.node_functions import NormReluConv, ReluConvSendNorm
from dnw_graph.propagation import BlockPropagation, MessagePassingPropagation, RealEdges, SparsePropagation

PROPAGATIONS = {
    "block": BlockPropagation(),
    "edge_index": MessagePassingPropagation("edge_index"),
    "csr": MessagePassingPropagation("csr"),
    "sparse": SparsePropagation(),
}
# Target ranges that overlap, nodes that are fed by several blocks, and node 6, which nothing feeds.
BLOCKS = [(range(4), range(2, 5)), (range(4, 7), range(1, 4)), (range(2), range(2)), (range(5, 7), range(4, 6))]
BLOCK_PAIRS = [(u, v) for sources, targets in BLOCKS for v in targets for u in sources]
N = 7


def named_tensors(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def make_graph(dynamics, function, **options):
    options = {"num_nodes": N, "num_inputs": 3, "num_outputs": 2, "num_edges": 20} | options
    return NeuralGraph(dynamics=dynamics, node_function=function, **options).double()


@pytest.mark.parametrize("propagation", PROPAGATIONS.values(), ids=PROPAGATIONS)
def test_receive_adds_up_blocks_of_candidates(propagation):
    graph = make_graph(Discrete(1), nn.Identity(), candidates=CandidateEdges(BLOCKS))
    matrix = dense_adjacency(N, BLOCK_PAIRS, graph.candidates.weight, 20)
    assert sum(1 for u, v in BLOCK_PAIRS if matrix[v, u]) == 20
    z = torch.randn(2, N, 3, 4, dtype=torch.float64)
    propagate = propagation(RealEdges(graph.candidates, graph.real_index, graph.candidates.weight), z)
    expected = product(matrix, z)
    for start in range(N):
        for stop in range(start + 1, N + 1):
            have = want = range(start, stop)
            part = torch.zeros_like(z)
            part[:, start:stop] = z[:, start:stop]
            sent = graph.dynamics.receive(propagate, z[:, start:stop], have, range(N))
            assert relative_error(sent, product(matrix, part)) < 1e-12
            received = graph.dynamics.receive(propagate, z, range(N), want)
            assert relative_error(received, expected[:, start:stop]) < 1e-12


@pytest.mark.parametrize("propagation", PROPAGATIONS.values(), ids=PROPAGATIONS)
@pytest.mark.parametrize("function", ["tanh", "instance"])
def test_steps_over_blocks_of_candidates(function, propagation):
    module = nn.Tanh() if function == "tanh" else partial(NormReluConv, norm="instance")
    graph = make_graph(Discrete(3), module, candidates=CandidateEdges(BLOCKS), propagation=propagation)
    p = named_tensors(graph.dynamics.functions()[0][0])
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    matrix = dense_adjacency(N, BLOCK_PAIRS, graph.candidates.weight, 20)
    plain = (lambda z, _: z.tanh()) if function == "tanh" else (lambda z, _: plain_norm_relu_conv(p, "instance", z))
    states, sent, offsets = plain_discrete(x, matrix, 3, plain)
    outputs = states[-1][:, -2:]
    found = graph(x)
    assert relative_error(found, outputs) < 1e-10
    (outputs**3 + outputs).sum().backward()
    (found**3 + found).sum().backward()
    by_hand = [summed_gradient(sent, offsets, u, v) for u, v in BLOCK_PAIRS]
    assert relative_error(graph.candidates.weight.grad, torch.tensor(by_hand, dtype=x.dtype)) < 1e-10


def test_outputs_that_nothing_feeds():
    candidates = CandidateEdges([(range(3), range(3, 5))], num_nodes=N)
    x = torch.randn(2, 3, dtype=torch.float64)
    graph = make_graph(Discrete(2), nn.Sigmoid(), candidates=candidates, num_edges=4)
    assert torch.equal(graph(x), torch.full((2, 2), 0.5, dtype=torch.float64))
    graph = make_graph(Continuous("euler"), nn.Sigmoid(), candidates=candidates, num_edges=4)
    assert torch.equal(graph(x), torch.full((2, 2), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("height_width", [(8, 8), (7, 5), (2, 9)])
@pytest.mark.parametrize("stride", [2, 3])
def test_strided_functions_keep_the_resolution_in_discrete_time(stride, height_width):
    graph = make_graph(Discrete(3), partial(NormReluConv, norm="instance"), stride=stride)
    p = named_tensors(graph.dynamics.functions()[0][0])
    x = torch.randn(2, 3, *height_width, dtype=torch.float64)
    height, width = (math.ceil(size / stride) for size in height_width)

    def function(z, step):
        small = plain_norm_relu_conv(p, "instance", z, stride)
        assert small.shape[2:] == (height, width)
        large = torch.zeros_like(z)
        large[:, :, :height, :width] = small  # zeros below and to the right, Figure 2
        return large

    matrix = dense_adjacency(N, all_pairs(N), graph.candidates.weight, 20)
    states, _, _ = plain_discrete(x, matrix, 3, function)
    assert relative_error(graph(x), states[-1][:, -2:]) < 1e-10
    found = graph(x, return_states=True)
    assert relative_error(found, torch.stack(states, dim=1)) < 1e-10
    assert found[:, 1:, :, :height, :width].any()
    assert not found[:, 1:, :, height:].any()
    assert not found[:, 1:, :, :, width:].any()


def test_strided_functions_keep_the_resolution_where_they_send():
    graph = make_graph(Discrete(2), partial(ReluConvSendNorm, norm="instance"), stride=2)
    p = named_tensors(graph.dynamics.functions()[0][0])
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)

    def send(z, step):
        large = torch.zeros_like(z)
        large[:, :, :3, :3] = plain_relu_conv(p, z)[:, :, ::2, ::2]
        return large

    matrix = dense_adjacency(N, all_pairs(N), graph.candidates.weight, 20)
    states, _, _ = plain_discrete(x, matrix, 2, lambda z, step: plain_norm(p, "instance", z), send=send)
    assert relative_error(graph(x), states[-1][:, -2:]) < 1e-10


@pytest.mark.parametrize("height_width", [(8, 8), (7, 5)])
def test_strided_functions_keep_the_resolution_in_continuous_time(height_width):
    # One step of Euler's method: Z(1) = Z(0) + f(A Z(0)).
    graph = make_graph(Continuous("euler"), partial(NormReluConv, norm="instance"), stride=2, num_outputs=N)
    p = named_tensors(graph.dynamics.functions()[0][0])
    x = torch.randn(2, 3, *height_width, dtype=torch.float64)
    start = torch.zeros(2, N, *height_width, dtype=torch.float64)
    start[:, :3] = x
    matrix = dense_adjacency(N, all_pairs(N), graph.candidates.weight, 20)
    change = graph(x) - start
    height, width = (math.ceil(size / 2) for size in height_width)
    expected = plain_norm_relu_conv(p, "instance", product(matrix, start), 2)
    assert relative_error(change[:, :, :height, :width], expected) < 1e-10
    assert not change[:, :, height:].any()
    assert not change[:, :, :, width:].any()


class TimedPart(nn.Module):
    """A function of time that can be applied to some nodes only."""

    node_wise = True

    def forward(self, z, t, nodes=None):
        return (z + t).tanh()


def test_functions_of_time_may_be_applied_to_some_nodes_only():
    graph = make_graph(Discrete(3), TimedPart())
    x = torch.randn(2, 3, dtype=torch.float64)
    matrix = dense_adjacency(N, all_pairs(N), graph.candidates.weight, 20)
    states, _, _ = plain_discrete(x, matrix, 3, lambda z, step: (z + step).tanh())
    assert relative_error(graph(x), states[-1][:, -2:]) < 1e-12


class TimedByDefault(nn.Module):
    def forward(self, z, t=0.0, *, scale=1.0):
        return (scale * z + t).tanh()


def test_a_time_with_a_default_is_given():
    x = torch.randn(2, 3, dtype=torch.float64)
    graph = make_graph(Discrete(3), TimedByDefault())
    matrix = dense_adjacency(N, all_pairs(N), graph.candidates.weight, 20)
    states, _, _ = plain_discrete(x, matrix, 3, lambda z, step: (z + step).tanh())
    assert relative_error(graph(x), states[-1][:, -2:]) < 1e-12
    graph = make_graph(Continuous("euler", options={"step_size": 0.25}), TimedByDefault())
    matrix = dense_adjacency(N, all_pairs(N), graph.candidates.weight, 20)
    start = torch.cat([x, x.new_zeros(2, N - 3)], dim=1)
    states = euler(lambda t, z: (product(matrix, z) + t).tanh(), start, (0, 1), 4)
    assert relative_error(graph(x), states[-1][:, -2:]) < 1e-12


class KeywordsOnly(nn.Module):
    def forward(self, z, *, t=0.0):
        return z


def test_the_second_argument_is_time_unless_it_is_something_else():
    assert takes_time(TimedPart())
    assert takes_time(TimedByDefault())
    assert not takes_time(KeywordsOnly())
    assert not takes_time(NormReluConv(3))
    assert not takes_time(nn.ConvTranspose2d(3, 3, 3))  # whose second argument is the size of the output
    assert not takes_time(nn.Tanh())
    assert not takes_time(nn.Sequential(nn.Tanh()))


@pytest.mark.parametrize(
    ("change", "made"),
    [
        (lambda z: z[:, :3], r"\[2, 3, 4, 4\] of \[2, 7, 4, 4\]"),
        (lambda z: z[:1], r"\[1, 7, 4, 4\] of \[2, 7, 4, 4\]"),
        (lambda z: z.repeat(1, 1, 1, 2), r"\[2, 7, 4, 8\] of \[2, 7, 4, 4\]"),
        (lambda z: z.flatten(2), r"\[2, 7, 16\] of \[2, 7, 4, 4\]"),
        (lambda z: z.mean(3), r"\[2, 7, 4\] of \[2, 7, 4, 4\]"),
    ],
)
@pytest.mark.parametrize("dynamics", [Discrete(2), Continuous()], ids=["discrete", "continuous"])
def test_functions_that_change_nodes_or_enlarge_maps_are_refused(change, made, dynamics, unchecked):
    graph = make_graph(dynamics, Changed(change))
    with pytest.raises(InputError, match=f"a node function must keep batch and nodes and not enlarge maps; .*{made}"):
        graph(torch.zeros(2, 3, 4, 4, dtype=torch.float64))


DYNAMICS = [Discrete(2), Continuous()]


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=["discrete", "continuous"])
class TestRefusals:
    def test_blocks(self, dynamics):
        with pytest.raises(InputError, match="a dynamic graph takes num_nodes, num_inputs and num_outputs"):
            NeuralGraph((3, 4), 5, dynamics=dynamics)
        with pytest.raises(InputError, match="without blocks"):
            NeuralGraph((3, 4), 5, dynamics=dynamics, num_nodes=7, num_inputs=3, num_outputs=2)

    @pytest.mark.parametrize("missing", ["num_nodes", "num_inputs", "num_outputs"])
    def test_a_missing_number_of_nodes(self, dynamics, missing):
        with pytest.raises(InputError, match="a dynamic graph takes num_nodes, num_inputs and num_outputs"):
            make_graph(dynamics, nn.Tanh(), **{missing: None})

    @pytest.mark.parametrize(("kind", "number"), [("num_inputs", 8), ("num_inputs", 0), ("num_outputs", 8)])
    def test_more_ends_than_nodes(self, dynamics, kind, number):
        with pytest.raises(InputError, match=f"{kind} must be in 1 … num_nodes = 7; got {number}"):
            make_graph(dynamics, nn.Tanh(), **{kind: number})

    @pytest.mark.parametrize("end", [{"input_function": False}, {"output_function": True}])
    def test_ends_of_static_graphs(self, dynamics, end):
        with pytest.raises(InputError, match="input_function and output_function are for static graphs"):
            make_graph(dynamics, nn.Tanh(), **end)

    def test_candidates_over_other_nodes(self, dynamics):
        with pytest.raises(InputError, match="candidates over 6 nodes do not fit 7 nodes"):
            make_graph(dynamics, nn.Tanh(), candidates=CandidateEdges.dynamic(6))

    def test_a_stride_for_a_ready_module(self, dynamics):
        with pytest.raises(InputError, match="stride 2 cannot be given to a module instance"):
            make_graph(dynamics, nn.Tanh(), stride=2)


def test_numbers_of_nodes_for_a_static_graph_are_refused():
    with pytest.raises(InputError, match=r"a static graph takes blocks=\(inputs, …, outputs\) only"):
        NeuralGraph(num_nodes=7, num_inputs=3, num_outputs=2, num_edges=5)
    with pytest.raises(InputError, match="without num_nodes and the like"):
        NeuralGraph((3, 4), 5, num_nodes=7)


def test_a_dynamics_object_is_copied():
    dynamics = Discrete(2)
    first, second = (make_graph(dynamics, "norm_relu_conv", name=name) for name in ("first", "second"))
    assert (first.dynamics.name, second.dynamics.name, dynamics.name) == ("first", "second", "graph")
    weights = [next(graph.dynamics.parameters()) for graph in (first, second)]
    assert weights[0] is not weights[1]
