import pytest
import torch
from torch import nn

from dnw_graph import Continuous, Discrete, NeuralGraph
from dnw_graph.analysis.silent import SilentBlock, largest_weights, silent_blocks, silent_nodes
from dnw_graph.wirings import Fixed


def graph_with(edges, **options):
    options = options or {"blocks": (2, 3, 3)}
    return NeuralGraph(num_edges=len(edges), wiring=Fixed(torch.tensor(edges).t()), name="stage", **options)


@pytest.mark.parametrize(
    ("edges", "silent", "blocks"),
    [
        ([(0, 2), (0, 5), (1, 6), (2, 7)], [3, 4], [SilentBlock("stage", 1, 2, 3)]),
        ([(0, 2), (0, 3), (0, 4), (4, 7)], [5, 6], [SilentBlock("stage", 2, 2, 3)]),
        ([(0, 2), (0, 3), (0, 5), (1, 6)], [4, 7], []),
    ],
)
def test_nodes_at_which_no_edge_arrives(edges, silent, blocks):
    model = torch.nn.Sequential(graph_with(edges))
    assert silent_nodes(model)["stage"].nonzero().flatten().tolist() == silent
    assert silent_blocks(model) == blocks


def test_a_silent_node_of_a_static_graph_is_a_constant_map():
    graph = graph_with([(0, 2), (0, 5), (1, 6), (2, 7)])
    states = {}
    function = graph.dynamics.node_functions[1]
    function.norm.register_forward_hook(lambda module, args, out: states.update(out=out))
    graph(torch.randn(2, 2, 4, 4))
    varies = states["out"].flatten(2).std(dim=2).amax(dim=0) > 0
    assert torch.equal(~varies, graph.silent_nodes()[2:5])


def dynamic(dynamics, inputs, outputs, edges=((0, 2), (1, 2), (2, 3), (2, 4))):
    return graph_with(edges, num_nodes=5, num_inputs=inputs, num_outputs=outputs, dynamics=dynamics)


def constant_with_gradient(graph, x):
    """The nodes whose norm gets constant maps at all times, and gradients to pass on to them."""
    maps, gradients = [], []
    norm = graph.dynamics.functions()[0][0].norm
    nn.init.ones_(norm.bias)  # ReLU passes the gradient of every node on.

    def watch(module, args, out):
        maps.append(args[0].detach())
        out.register_hook(gradients.append)

    norm.register_forward_hook(watch)
    graph(x).square().sum().backward()
    varies, learns = torch.cat(maps).flatten(2).std(dim=2).any(0), torch.cat(gradients).ne(0).any(3).any(2).any(0)
    return (~varies & learns).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("dynamics", "inputs", "outputs", "silent"),
    [
        (Discrete(4), 2, 2, [0, 1]),
        (Discrete(4), 2, 4, [0, 1]),
        (Discrete(4), 5, 5, [0, 1]),
        (Continuous("euler", options={"step_size": 0.25}), 2, 2, [0, 1]),
        (Discrete(4, input_mode="hold"), 2, 2, []),
        (Discrete(4, input_mode="hold"), 2, 4, [1]),  # After the last step an output has the state of its norm.
        (Discrete(input_mode="sequence"), 2, 2, []),
        (Discrete(input_mode="sequence"), 5, 5, [0, 1]),
    ],
    ids=repr,
)
def test_inputs_of_a_dynamic_graph_are_silent_where_their_norm_passes_gradients_on(dynamics, inputs, outputs, silent):
    graph = dynamic(dynamics, inputs, outputs)
    assert graph.silent_nodes().nonzero().flatten().tolist() == silent
    time = [4] if graph.dynamics.node_dim == 2 else []
    assert constant_with_gradient(graph, torch.randn(2, *time, inputs, 4, 4)) == silent


def test_a_block_of_silent_inputs_is_found():
    edges = [(0, 1), (1, 0)]
    graph = graph_with(edges, num_nodes=5, num_inputs=5, num_outputs=5, dynamics=Discrete(3))
    assert silent_blocks(graph) == [SilentBlock("stage", 0, 3, 5)]


def test_the_largest_weight_is_of_any_candidate():
    graph = graph_with([(0, 2), (0, 5)])
    with torch.no_grad():
        graph.candidates.weight[-1] = -7.5  # hallucinated
    assert largest_weights(graph) == {"stage": 7.5}


def test_what_a_block_says():
    assert str(SilentBlock("stage1", 1, 56, 64)) == "56 of the 64 nodes of block 1 of stage1"
