from functools import partial

import networkx as nx
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dnw_graph import Continuous, Discrete, NeuralGraph
from dnw_graph.cost import Cost, cost, live_nodes, neural_graphs
from dnw_graph.models import STAGES, MobileNetV1, MobileNetV1DNW, TinyClassifier
from dnw_graph.node_functions import NormReluConv

MAPS = [112, 56, 28, 14, 7]  # map sizes of the stages at 224 pixels


def counted_by_pytorch(model, input_size):
    """Multiply-adds as PyTorch's own counter sees them: two operations each."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *input_size))
    return counter.get_total_flops() // 2


def live_by_networkx(model, small=False):
    """The nodes of all stages from which real edges lead to a logit; outputs of one stage are inputs of the next.

    Returns:
        One set of nodes for each stage, and for the classifier's inputs where its edges are learned.
    """
    network = nx.DiGraph()
    for number, stage in enumerate(model.stages):
        network.add_nodes_from((number, v) for v in range(stage.num_nodes))
        network.add_edges_from(((number, u), (number, v)) for u, v in stage.edge_index.T.tolist())
        if number > 0:
            before = model.stages[number - 1]
            first_output = before.num_nodes - before.num_outputs
            network.add_edges_from(((number - 1, first_output + i), (number, i)) for i in range(before.num_outputs))
    features = [(4, 512 + 1024 + i) for i in range(1024)]
    if small:
        pairs = model.classifier.graph.edge_index.T.tolist()
        network.add_edges_from((features[u], ("logit", v - 1024)) for u, v in pairs)
        logits = {("logit", v) for v in range(model.classifier.graph.num_outputs)} & set(network)
    else:
        logits = {"logits"}
        network.add_edges_from((feature, "logits") for feature in features)
    network.add_edges_from((logit, "end") for logit in logits)
    live = nx.ancestors(network, "end")
    return [{v for v in range(stage.num_nodes) if (number, v) in live} for number, stage in enumerate(model.stages)]


@pytest.mark.parametrize(("width", "multiply_adds", "parameters"), [(0.25, 41.0, 0.5), (0.5, 149, 1.3)])
def test_mobilenet_v1_costs_what_table_3_says(width, multiply_adds, parameters):
    model = MobileNetV1(width)
    result = cost(model, (3, 224, 224))
    digits = 1 if width == 0.25 else 0
    assert round(result.multiply_adds / 1e6, digits) == multiply_adds
    assert round(result.parameters / 1e6, 1) == parameters


TWICE = nn.Conv2d(3, 3, 3, padding=1)


@pytest.mark.parametrize(
    ("model", "input_size"),
    [
        (MobileNetV1(0.25, num_classes=10), (3, 96, 64)),
        (MobileNetV1(0.5, num_classes=10, stem_stride=1), (3, 32, 32)),
        (nn.Sequential(nn.Conv2d(4, 6, (3, 5), (2, 1), bias=False), nn.Conv2d(6, 6, 3, groups=3)), (4, 11, 13)),
        (nn.Sequential(nn.Flatten(), nn.Linear(18, 7), nn.ReLU(), nn.Linear(7, 3)), (2, 3, 3)),
        (nn.Linear(5, 3), (4, 5)),
        (nn.Sequential(TWICE, nn.ReLU(), TWICE), (3, 6, 6)),
    ],
    ids=["mobilenet ×0.25", "mobilenet ×0.5", "convolutions", "linear", "linear at four places", "one layer twice"],
)
def test_dense_models_cost_what_pytorch_counts(model, input_size):
    result = cost(model, input_size)
    assert result.multiply_adds == counted_by_pytorch(model, input_size)
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert result.parameters == sum(p.numel() for p in model.parameters()) - norms


def test_a_complete_graph_costs_what_pytorch_counts():
    graph = NeuralGraph((8, 6, 4), 8 * 6 + 14 * 4, stride=2, propagation="block")
    result = cost(graph, (8, 12, 12))
    assert result.multiply_adds == counted_by_pytorch(graph, (8, 12, 12))
    assert result.multiply_adds == 36 * (8 * 6 + 14 * 4 + 9 * 14)
    assert result.parameters == 8 * 6 + 14 * 4 + 9 * 14


def test_complete_layers_cost_what_mobilenet_v1_costs():
    layered = MobileNetV1DNW(width=1.0, layered=True, num_classes=10)
    dense = MobileNetV1(width=1.0, num_classes=10)
    assert cost(layered, (3, 64, 64)) == cost(dense, (3, 64, 64))


def test_random_graph_costs_the_edges_and_live_nodes_counted_by_hand():
    model = MobileNetV1DNW(width=0.225, wiring="random_graph")
    live = live_by_networkx(model)
    edges = [103, 1_244, 4_976, 72_990, 79_626]

    def total(kept_edges, kept_nodes, kept_stem):
        """Multiply-adds: products and node convolutions at the stage's resolution, stem, classifier."""
        multiply_adds = sum((e + 9 * n) * s**2 for e, n, s in zip(kept_edges, kept_nodes, MAPS, strict=True))
        return multiply_adds + 27 * kept_stem * 112**2 + 1024 * 1000

    non_outputs = [sum(stage[:-1]) for stage in STAGES]
    nothing_dead = total(edges, non_outputs, 32)
    assert nothing_dead == 56_550_114  # 27.3M for edges, 17.4M for nodes, 10.8M for the stem, 1.0M for the classifier

    live_non_outputs = [sum(v < n for v in nodes) for nodes, n in zip(live, non_outputs, strict=True)]
    live_edges = [
        sum(v in nodes for v in stage.edge_index[1].tolist()) for stage, nodes in zip(model.stages, live, strict=True)
    ]
    live_stem = sum(v < 32 for v in live[0])
    result = cost(model, (3, 224, 224))
    assert result.multiply_adds == total(live_edges, live_non_outputs, live_stem)
    assert result.parameters == sum(live_edges) + 9 * sum(live_non_outputs) + 27 * live_stem + 1024 * 1000 + 1000
    # Some nodes are dead, but few: the paper's random graph shows 55.7M and 1.2M parameters.
    assert 0.95 * nothing_dead < result.multiply_adds < nothing_dead
    assert round(result.parameters / 1e6, 1) == 1.2


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("width", [0.05, 0.225])
def test_live_nodes_are_those_that_reach_a_logit_through_all_stages(small, width):
    model = MobileNetV1DNW(width=width, num_classes=7, small=small)
    expected = live_by_networkx(model, small)
    live = live_nodes(model)
    assert list(live)[:5] == ["stage1", "stage2", "stage3", "stage4", "stage5"]
    for nodes, mask in zip(expected, list(live.values())[:5], strict=True):
        assert set(mask.nonzero().flatten().tolist()) == nodes
    if small:
        features = {v - 1536 for v in expected[-1] if v >= 1536}
        assert set(live["classifier"].nonzero().flatten().tolist()) == features | set(range(1024, 1031))
    assert any(len(nodes) < stage.num_nodes for nodes, stage in zip(expected, model.stages, strict=True))


def chain_with_a_dead_end():
    """Blocks (2, 2, 2, 1): 0 → 2 → 4 → 6 is live; 1 → 3 → 5 and 0 → 3 end at 5, which has no output edge."""
    graph = NeuralGraph((2, 2, 2, 1), 6)
    index = graph.candidates.flat_index(torch.tensor([[0, 2, 4, 1, 3, 0], [2, 4, 6, 3, 5, 3]]))
    graph.candidates.weight.data.mul_(0.01)[index] = 1.0
    return graph


def test_a_chain_that_ends_nowhere_is_dead_as_a_whole():
    graph = chain_with_a_dead_end()
    assert live_nodes(graph)["graph"].tolist() == [True, False, True, False, True, False, True]
    # Three live edges and three live convolutions of nine weights, on maps of 16.
    assert cost(graph, (2, 4, 4)) == Cost(parameters=3 + 27, multiply_adds=16 * (3 + 27))


def test_of_a_stem_of_several_layers_only_the_last_one_s_channels_can_be_dead():
    model = TinyClassifier("static")
    graph = model.graph
    source, _ = graph.candidates.pairs(torch.arange(graph.num_candidates))
    graph.candidates.weight.data[source < 16] = 0  # half of the 32 inputs have no real edge
    (live,) = live_nodes(model).values()
    assert live[:32].sum() == 16
    source, target = graph.edge_index
    edges, nodes = int((live[source] & live[target]).sum()), int(live[:800].sum())
    stem = [3 * 16 * 9, 16 * 9, 16 * 16]  # convolution, depthwise, and 16 of the 32 pointwise outputs
    result = cost(model, (3, 32, 32))
    assert result.parameters == sum(stem) + edges + 9 * nodes + 1_010
    assert result.multiply_adds == 16**2 * stem[0] + 8**2 * (stem[1] + stem[2] + edges + 9 * nodes) + 1_000


def test_dead_nodes_do_not_matter_to_the_output():
    graph = chain_with_a_dead_end().eval()
    x = torch.randn(2, 2, 4, 4)
    other = x.clone()
    other[:, 1] = torch.randn(2, 4, 4)
    assert torch.equal(graph(x), graph(other))


def test_an_output_without_an_edge_is_live():
    graph = NeuralGraph((1, 2), 1, node_function=nn.Identity())
    assert live_nodes(graph)["graph"].all()


def test_counting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), NeuralGraph((4, 3, 2), 9), nn.Dropout())
    model[1].eval()
    modes = [m.training for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first = cost(model, (3, 9, 9))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert cost(model, (3, 9, 9)) == first


def test_graphs_are_found_by_name_or_else_by_path():
    model = nn.Sequential(
        NeuralGraph((2, 3), 3), nn.Sequential(NeuralGraph((3, 2), 3)), NeuralGraph((2, 3), 3, name="c")
    )
    assert list(neural_graphs(model)) == ["0", "1.0", "c"]
    assert list(neural_graphs(model[0])) == ["graph"]


@pytest.mark.parametrize("dynamics", [Discrete(steps=5), Discrete(steps=2, input_mode="hold"), Continuous("rk4")])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_recurrent_graphs_cost_what_pytorch_counts_over_all_steps(dynamics, norm):
    function = partial(NormReluConv, norm=norm)
    graph = NeuralGraph(
        num_nodes=6, num_inputs=2, num_outputs=2, dynamics=dynamics, node_function=function, propagation="block"
    )  # all candidates are real, so the dense products do no work that is not the graph's
    assert cost(graph, (2, 4, 4)).multiply_adds == counted_by_pytorch(graph, (2, 4, 4))


def test_a_wrapped_model_costs_the_same():
    model = MobileNetV1DNW(width=0.1, num_classes=10, stem_stride=1, wiring="random_graph")
    assert cost(nn.Sequential(model), (3, 16, 16)) == cost(model, (3, 16, 16))
