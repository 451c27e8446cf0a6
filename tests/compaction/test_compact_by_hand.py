"""Small graphs drawn by hand: what is removed, what stays, and outputs against a plain loop."""

import pytest
import torch
from dynamic_reference import plain_discrete, plain_norm_relu_conv
from reference import batch_norm, convolve, plain_forward, relative_error
from torch import nn

from dnw_graph import Continuous, Discrete, Fixed, NeuralGraph
from dnw_graph.analysis.cost import live_nodes
from dnw_graph.compaction import compact
from dnw_graph.compaction.plain_layers import Conv, Select

PRODUCTS = ["sparse", "dense"]


def drawn(edges, blocks=None, **options):
    """A graph with the given edges, random weights and random norms."""
    edge_index = torch.tensor(edges).T
    graph = NeuralGraph(blocks, edge_index.size(1), wiring=Fixed(edge_index), **options).double()
    for name, tensor in graph.named_parameters():
        nn.init.normal_(tensor, mean=float("norm" in name and "weight" in name))
    for name, tensor in graph.named_buffers():
        if "running" in name:
            nn.init.uniform_(tensor, 0.5, 2)
    return graph.eval()


def evaluated(function, v, maps):
    """Norm → ReLU → convolution of one node with the running statistics."""
    norm = function.norm
    mean, variance = norm.running_mean[v], norm.running_var[v]
    scaled = (maps - mean) / torch.sqrt(variance + 1e-5) * norm.weight[v] + norm.bias[v]
    return convolve(scaled.relu(), function.conv.weight[v, 0], function.conv.stride[0])


def by_hand(graph, x):
    """The outputs of a static graph, node by node and edge by edge."""
    sizes, functions = list(graph.blocks), graph.dynamics.node_functions
    starts = [sum(sizes[:block]) for block in range(len(sizes))]

    def node_function(v, received):
        block = max(b for b, start in enumerate(starts) if v >= start)
        if isinstance(functions[block], nn.Identity):
            return received
        if not isinstance(received, torch.Tensor) or received.dim() == 0:
            raise AssertionError("a node without edges receives maps of zeros")
        return evaluated(functions[block], v - starts[block], received)

    edges = {tuple(pair): w for pair, w in zip(graph.edge_index.T.tolist(), graph.edge_weight, strict=True)}
    # plain_forward adds a zero of the size of the maps to what every node receives.
    states, _ = plain_forward(x, sizes, edges, node_function)
    return torch.stack(states[-sizes[-1] :], dim=1)


@pytest.fixture
def maps(photos):
    return photos[:, :, :9, :7]


STATIC = {
    # Inputs 0-2, inner nodes 3-5 and 6-7, outputs 8-9.
    "chain": ([(0, 3), (3, 6), (6, 8), (1, 9)], [0, 1, 3, 6, 8, 9]),
    "dead end": ([(0, 3), (3, 6), (6, 8), (1, 4), (4, 7), (2, 9)], [0, 2, 3, 6, 8, 9]),
    "a node without inputs": ([(0, 3), (3, 8), (5, 9), (5, 6), (6, 8)], [0, 3, 5, 6, 8, 9]),
    "dead inputs": ([(2, 3), (3, 8), (3, 9)], [2, 3, 8, 9]),
    "an output without edges": ([(0, 3), (3, 8)], [0, 3, 8, 9]),
    "a whole block dead": ([(0, 3), (3, 8), (4, 9)], [0, 3, 4, 8, 9]),
    "one live node per block": ([(1, 4), (4, 7), (7, 8), (7, 9)], [1, 4, 7, 8, 9]),
    # The first input stays, for the size of the maps.
    "no input reaches an output": ([(3, 8), (7, 9), (0, 4)], [0, 3, 7, 8, 9]),
}


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("stride", [1, 2])
def test_static(kind, products, stride, maps):
    edges, kept = STATIC[kind]
    graph = drawn(edges, (3, 3, 2, 2), stride=stride)
    compacted = compact(graph, products=products)
    report = compacted.report
    assert report.after.nodes == len(kept)
    assert report.after.edges == sum(u in kept and v in kept for u, v in edges)
    with torch.no_grad():
        expected = by_hand(graph, maps)
        assert relative_error(compacted(maps), expected) < 1e-12
    inputs = [v for v in kept if v < 3]
    if len(inputs) < 3:
        assert isinstance(compacted.layers[0], Select)
        assert compacted.layers[0].index.tolist() == inputs


def test_constant_maps_have_borders(maps):
    graph = drawn([(3, 5), (0, 5)], (3, 2, 1))
    graph.dynamics.node_functions[1].norm.bias.data.fill_(3)
    graph.dynamics.node_functions[1].norm.running_mean.zero_()
    edge = int(graph.candidates.flat_index(torch.tensor([[0], [5]])))
    graph.candidates.weight.data[edge] = 0
    for products in PRODUCTS:
        out = compact(graph, products=products)(maps)[0, 0]
        assert torch.allclose(out[1:-1, 1:-1], out[1, 1])
        assert not torch.allclose(out[0, 0], out[1, 1])


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_dead_cycles_go_and_live_ones_stay(products, norm, maps):
    # 0 → 3 ⇄ 4 → 7 is live; 5 ⇄ 6 and the loop at 2, fed by 1, are not; 8 receives nothing.
    edges = [(0, 3), (3, 4), (4, 3), (4, 7), (1, 5), (5, 6), (6, 5), (1, 2), (2, 2)]
    sizes = {"num_nodes": 9, "num_inputs": 2, "num_outputs": 2}
    graph = drawn(edges, dynamics=Discrete(steps=4), **sizes)
    if norm == "instance":
        graph = drawn(edges, dynamics=Discrete(steps=4), node_function=_instance, **sizes)
    compacted = compact(graph, products=products)
    assert compacted.report.after.nodes == 5
    assert compacted.report.after.edges == 4
    x = maps[:, :2]
    matrix = torch.zeros(9, 9, dtype=torch.float64)
    source, target = graph.edge_index
    matrix[target, source] = graph.edge_weight
    function = graph.dynamics.node_functions[0]
    parameters = dict(function.named_parameters())

    def apply(received, step):
        if norm == "instance":
            return plain_norm_relu_conv(parameters, "instance", received)
        return torch.stack([evaluated(function, v, received[:, v]) for v in range(9)], dim=1)

    with torch.no_grad():
        states, _, _ = plain_discrete(x, matrix, 4, apply)
        assert relative_error(compacted(x), states[-1][:, -2:]) < 1e-12
        euler = drawn(edges, dynamics=Continuous("euler", options={"step_size": 0.5}), **sizes)
        assert relative_error(compact(euler, products=products)(x), euler(x)) < 1e-12


def _instance(num_nodes):
    from dnw_graph.node_functions import NormReluConv

    return NormReluConv(num_nodes, norm="instance")


@pytest.mark.parametrize("products", PRODUCTS)
def test_dead_inputs_reach_back_through_graphs_into_the_stem(products, photos):
    # Of the second graph's inputs only 1 is live, so that of the first graph only 2 → 5 is; channel 2 of the stem.
    first = drawn([(0, 4), (2, 5), (3, 6), (1, 6)], (4, 3))
    second = drawn([(1, 4), (4, 6), (0, 3)], (3, 2, 2))
    stem = nn.Conv2d(3, 4, 3, 2, 1, bias=False).double()
    model = nn.Sequential(stem, first, second).eval()
    compacted = compact(model, products=products)
    assert [after.nodes for _, after in compacted.report.graphs.values()] == [2, 4]
    assert [after.edges for _, after in compacted.report.graphs.values()] == [1, 2]
    conv = compacted.layers[0]
    assert isinstance(conv, Conv)
    assert conv.weight.shape == (1, 3, 3, 3)
    with torch.no_grad():
        expected = by_hand(second, by_hand(first, stem(photos)))
        assert relative_error(compacted(photos), expected) < 1e-12
    # By themselves, all outputs of the first graph count.
    assert int(live_nodes(first)["graph"].sum()) == 7


@pytest.mark.parametrize("products", PRODUCTS)
def test_outputs_of_a_recurrent_graph_that_nobody_needs(products, maps):
    sizes = {"num_nodes": 8, "num_inputs": 3, "num_outputs": 4}
    edges = [(0, 3), (3, 5), (1, 6), (6, 5), (5, 6), (2, 7), (3, 4), (4, 4)]
    reader = drawn([(1, 4)], (4, 1), input_function=False)
    for dynamics in (Discrete(steps=3), Continuous("rk4")):
        model = nn.Sequential(drawn(edges, dynamics=dynamics, **sizes), reader)
        compacted = compact(model, products=products)
        # 5 is needed; 6 feeds it, though nobody reads 6 as an output; 4 and 7 are not.
        assert compacted.report.graphs["0"][1].nodes == 5
        with torch.no_grad():
            assert relative_error(compacted(maps), model(maps)) < 1e-12


def test_the_reference_s_norm_is_the_running_one(maps):
    # ``evaluated`` and the reference's training-mode norm agree where the statistics are those of the batch.
    function = drawn([(0, 1)], (1, 1)).dynamics.node_functions[0]
    one = maps[:, 0]
    function.norm.running_mean[0], function.norm.running_var[0] = one.mean(), one.var(correction=0)
    expected = batch_norm(one, function.norm.weight[0], function.norm.bias[0]).relu()
    assert relative_error(evaluated(function, 0, one), convolve(expected, function.conv.weight[0, 0])) < 1e-12
