import pytest
import torch

from dnw_graph import Discrete, NeuralGraph
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


def test_inputs_of_a_dynamic_graph_are_not_silent():
    graph = graph_with([(0, 1), (1, 3)], num_nodes=4, num_inputs=1, num_outputs=2, dynamics=Discrete(2))
    assert graph.silent_nodes().tolist() == [False, False, True, False]


def test_the_largest_weight_is_of_any_candidate():
    graph = graph_with([(0, 2), (0, 5)])
    with torch.no_grad():
        graph.candidates.weight[-1] = -7.5  # hallucinated
    assert largest_weights(graph) == {"stage": 7.5}


def test_what_a_block_says():
    assert str(SilentBlock("stage1", 1, 56, 64)) == "56 of the 64 nodes of block 1 of stage1"
