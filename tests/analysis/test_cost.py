from functools import partial

import networkx as nx
import pytest
import torch
from pairs import every_value
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dnw_graph import Continuous, Discrete, Fixed, InputError, NeuralGraph
from dnw_graph.analysis.cost import Cost, CostRow, cost, live_nodes, neural_graphs
from dnw_graph.models import STAGES, MobileNetV1, MobileNetV1DNW, TinyClassifier
from dnw_graph.node_functions import Blockwise, NodeConv, NormReluConv

MAPS = [112, 56, 28, 14, 7]  # map sizes of the stages at 224 pixels


def counted_by_pytorch(model, input_size):
    """Multiply-adds as PyTorch's own counter sees them: two operations each."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *input_size))
    return counter.get_total_flops() // 2


def totals(result):
    return result.parameters, result.multiply_adds


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


def test_a_complete_graph_costs_what_pytorch_counts():
    graph = NeuralGraph((8, 6, 4), 8 * 6 + 14 * 4, stride=2, propagation="block")
    result = cost(graph, (8, 12, 12))
    assert result.multiply_adds == counted_by_pytorch(graph, (8, 12, 12))
    assert result.multiply_adds == 36 * (8 * 6 + 14 * 4 + 9 * 14)
    assert result.parameters == 8 * 6 + 14 * 4 + 11 * 14  # of each node a kernel, and scale and shift of its norm


@pytest.mark.slow
def test_complete_layers_cost_what_mobilenet_v1_costs():
    layered = MobileNetV1DNW(width=1.0, layered=True, num_classes=10)
    dense = MobileNetV1(width=1.0, num_classes=10)
    # MobileNetV1 has two norms for each of our node functions' one, which the paper's count leaves out.
    assert totals(cost(layered, (3, 64, 64), paper=True)) == totals(cost(dense, (3, 64, 64), paper=True))


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
    rest = 27 * live_stem + 2 * 1024 + 1024 * 1000 + 1000  # stem, norm of the head, classifier
    assert result.parameters == sum(live_edges) + 11 * sum(live_non_outputs) + rest
    # Some nodes are dead, but few: the paper's random graph shows 55.7M and 1.2M parameters.
    assert 0.95 * nothing_dead < result.multiply_adds < nothing_dead
    assert round(result.parameters / 1e6, 1) == 1.2
    whole = cost(model, (3, 224, 224), dead_nodes=True)
    candidates = sum(p.numel() for name, p in model.named_parameters() if "candidates" in name)
    stored = sum(p.numel() for p in model.parameters())
    assert totals(whole) == (stored - candidates + sum(edges), nothing_dead)


@every_value(rest=pytest.mark.slow, small=[False, True], width=[0.05, 0.225])
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


def test_live_nodes_of_edges_that_are_known_already():
    model = MobileNetV1DNW(width=0.05, num_classes=7)
    known = {name: graph.real_index[::2] for name, graph in neural_graphs(model).items()}
    live = live_nodes(model, known)
    wanted = None
    for name, graph in reversed(neural_graphs(model).items()):
        network = nx.DiGraph(zip(*graph.candidates.pairs(known[name]).tolist(), strict=True))
        outputs = torch.arange(graph.num_nodes)[-graph.num_outputs :]
        ends = set((outputs if wanted is None else outputs[wanted]).tolist())
        expected = ends.union(*(nx.ancestors(network, end) for end in ends & set(network)))
        assert set(live[name].nonzero().flatten().tolist()) == expected
        wanted = live[name][: graph.num_inputs]
    assert any((live[name] != mask).any() for name, mask in live_nodes(model).items())


def chain_with_a_dead_end():
    """Blocks (2, 2, 2, 1): 0 → 2 → 4 → 6 is live; 1 → 3 → 5 and 0 → 3 end at 5, which has no output edge."""
    graph = NeuralGraph((2, 2, 2, 1), 6)
    index = graph.candidates.flat_index(torch.tensor([[0, 2, 4, 1, 3, 0], [2, 4, 6, 3, 5, 3]]))
    graph.candidates.weight.data.mul_(0.01)[index] = 1.0
    return graph


def test_a_chain_that_ends_nowhere_is_dead_as_a_whole():
    graph = chain_with_a_dead_end()
    assert live_nodes(graph)["graph"].tolist() == [True, False, True, False, True, False, True]
    # Three live edges, three live convolutions of nine weights and their norms of two, on maps of 16.
    assert cost(graph, (2, 4, 4)) == Cost((CostRow("graph", 3 + 27 + 6, 16 * (3 + 27)),))
    assert cost(graph, (2, 4, 4), dead_nodes=True) == Cost((CostRow("graph", 6 + 54 + 12, 16 * (6 + 54)),))


def test_the_paper_s_count_looks_one_edge_ahead_by_hand():
    # 5 alone has no output edge. All six edges count, and the convolutions of 0 … 4; norms do not.
    assert cost(chain_with_a_dead_end(), (2, 4, 4), paper=True) == Cost((CostRow("graph", 6 + 45, 16 * (6 + 45)),))


def graph_with_a_dead_cycle():
    """Nodes 0 … 4, 0 the input, 4 the output: 0 → 4 is live, the cycle 1 ⇄ 2 and the loop at 3 reach nothing."""
    edges = torch.tensor([[0, 0, 1, 2, 3], [4, 1, 2, 1, 3]])
    function = partial(NormReluConv, norm="instance")
    return NeuralGraph(
        num_nodes=5, num_inputs=1, num_outputs=1, num_edges=5, wiring=Fixed(edges), dynamics=Discrete(steps=2),
        node_function=function,
    )  # fmt: skip


def test_a_cycle_that_reaches_no_output_is_dead():
    # Step 1: 0 → 4, and f at 0 and 4. Step 2: only the output is computed: 0 → 4 again, f at 4.
    assert cost(graph_with_a_dead_cycle(), (1, 4, 4)) == Cost((CostRow("graph", 1 + 18 + 4, 16 * (1 + 18 + 1 + 9)),))


def test_the_paper_s_count_keeps_a_dead_cycle():
    # Step 1: the two edges from the input, f at all five nodes. Step 2: the one edge into the output, f at it.
    result = cost(graph_with_a_dead_cycle(), (1, 4, 4), paper=True)
    assert result == Cost((CostRow("graph", 5 + 45, 16 * (2 + 45 + 1 + 9)),))


class Classifier(nn.Module):
    """Two chained graphs of two inputs and two outputs each, behind a 1×1 convolution, before a linear layer.

    Real edges: 0 → 2 and 1 → 3 in the first graph, 0 → 3 in the second, with no edge at its output 2.
    """

    def __init__(self, classifier=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)
        edges = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0], [3]])
        self.stages = nn.ModuleList(
            NeuralGraph((2, 2), each.size(1), wiring=Fixed(each), name=f"stage{number}")
            for number, each in enumerate(edges, start=1)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier or nn.Linear(2, 5)

    def forward(self, x):
        return self.classifier(self.pool(self.stages[1](self.stages[0](self.stem(x)))).flatten(1))

    def live_nodes_by_graph(self):
        later = self.stages[1].live_nodes()
        return {self.stages[1]: later, self.stages[0]: self.stages[0].live_nodes(later[:2])}


def test_both_counts_of_chained_graphs_by_hand():
    model = Classifier()
    # Node 1 of the second graph has no output edge, so that 1 → 3 of the first is of no use. What the stem feeds is not
    # known: it counts in full.
    assert cost(model, (3, 4, 4)).rows == (
        CostRow("stem", 8, 16 * 6),
        CostRow("stage1", 1 + 9 + 2, 16 * (1 + 9)),
        CostRow("stage2", 1 + 9 + 2, 16 * (1 + 9)),
        CostRow("classifier", 15, 10),
    )
    # The paper's count of the first graph does not look at the second; output 2 of that one has no edge and no column.
    assert cost(model, (3, 4, 4), paper=True).rows == (
        CostRow("stem", 8, 16 * 6),
        CostRow("stage1", 2 + 18, 16 * (2 + 18)),
        CostRow("stage2", 1 + 9, 16 * (1 + 9)),
        CostRow("classifier", 10, 5),
    )


def live_in_a_chain(graphs):
    """The nodes of each graph from which real edges lead to an output of the last one."""
    network = nx.DiGraph()
    for number, graph in enumerate(graphs):
        network.add_nodes_from((number, v) for v in range(graph.num_nodes))
        network.add_edges_from(((number, u), (number, v)) for u, v in graph.edge_index.T.tolist())
        following = "end" if number == len(graphs) - 1 else number + 1
        first_output = graph.num_nodes - graph.num_outputs
        for i in range(graph.num_outputs):
            network.add_edge((number, first_output + i), following if following == "end" else (following, i))
    live = nx.ancestors(network, "end")
    return [{v for v in range(graph.num_nodes) if (number, v) in live} for number, graph in enumerate(graphs)]


def chained_graphs():
    """Two graphs, of the first of which some outputs are of no use to the second."""
    torch.manual_seed(0)
    return NeuralGraph((6, 8, 4), 12, name="first"), NeuralGraph((4, 5, 3), 6, name="second")


def live_sets(model):
    return [set(mask.nonzero().flatten().tolist()) for mask in live_nodes(model).values()]


def test_graphs_of_a_sequential_are_live_where_they_reach_its_end():
    first, second = chained_graphs()
    relu = nn.ReLU()
    between = nn.Sequential(nn.BatchNorm2d(4), relu, nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.MaxPool2d(2))
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Sequential(relu, first), between, nn.Dropout(), second, nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(3, 2),
    )  # fmt: skip
    live = live_in_a_chain([first, second])
    assert live_sets(model) == live
    assert len(live[0]) < int(first.live_nodes().sum())
    # Edges into live nodes, convolutions of live nodes that are no outputs, and what feeds live inputs alone.
    edges = [
        sum(v in nodes for v in graph.edge_index[1].tolist())
        for graph, nodes in zip((first, second), live, strict=True)
    ]
    convolutions = [9 * len(live[0] & set(range(14))), 9 * len(live[1] & set(range(9)))]
    inputs = [len(nodes & set(range(n))) for nodes, n in zip(live, (6, 4), strict=True)]
    expected = 64 * (3 * inputs[0] + edges[0] + convolutions[0] + 9 * inputs[1]) + 16 * (edges[1] + convolutions[1]) + 6
    result = cost(model, (3, 8, 8))
    assert result.multiply_adds == expected
    norms = 2 * inputs[1] + 2 * sum(convolutions) // 9
    assert result.parameters == 4 * inputs[0] + 10 * inputs[1] + sum(edges) + sum(convolutions) + norms + 8


def test_graphs_of_vectors_behind_a_flattening():
    torch.manual_seed(0)
    maps, vectors = NeuralGraph((2, 5, 4), 9, name="maps"), NeuralGraph((4, 3), 3, input_function=False, name="vectors")
    model = nn.Sequential(maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), vectors)
    assert live_sets(model) == live_in_a_chain([maps, vectors])
    assert len(live_sets(model)[0]) < int(maps.live_nodes().sum())
    wide = NeuralGraph((16, 3), 1, input_function=False)  # it reads four values of each channel
    model = nn.Sequential(nn.Conv2d(3, 2, 1), maps, nn.AdaptiveAvgPool2d(2), nn.Flatten(), wide)
    assert live_nodes(model)["maps"].tolist() == maps.live_nodes().tolist()


class WithItself(NeuralGraph):
    """A graph whose inputs are outputs as well."""

    def forward(self, x):
        return super().forward(x) + x[:, : self.num_outputs]


OVER_TIME = {
    "num_nodes": 12, "num_inputs": 4, "num_outputs": 3, "num_edges": 6, "dynamics": Discrete(input_mode="sequence"),
}  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [
        lambda first, second: nn.Sequential(first, nn.GroupNorm(2, 4), second),
        lambda first, second: nn.Sequential(first, nn.Softmax2d(), second),
        lambda first, second: nn.Sequential(first, nn.Conv2d(4, 4, 1), second),
        lambda first, second: nn.Sequential(first, nn.Conv2d(4, 4, 3, groups=2), second),
        lambda first, second: nn.Sequential(first, type("Own", (nn.ReLU,), {})(), second),
        lambda first, second: nn.Sequential(first, WithItself((4, 5, 3), 6, name="second")),
        lambda first, second: nn.Sequential(first, NeuralGraph(**OVER_TIME, name="second")),
        lambda first, second: type("Own", (nn.Sequential,), {"forward": lambda self, x: x})(first, second),
        lambda first, second: nn.Sequential(nn.Sequential(first, second), nn.Conv2d(3, 6, 1), first),
        lambda first, second: nn.Sequential(first, second, nn.Conv2d(3, 6, 1), first),
        lambda first, second: nn.ModuleList([first, second]),
    ],
)
def test_where_nothing_proves_what_reads_them_all_outputs_count(build):
    first, second = chained_graphs()
    live = live_nodes(build(first, second))
    assert live["first"].tolist() == first.live_nodes().tolist()
    assert live["first"].tolist() != live_nodes(nn.Sequential(first, second))["first"].tolist()


def test_a_chain_that_is_used_twice_feeds_more_than_what_follows_it():
    first, second = chained_graphs()
    body = nn.Sequential(nn.ReLU(), first)
    model = nn.ModuleDict({"main": nn.Sequential(nn.Conv2d(3, 6, 1), body, second), "again": body})
    assert live_nodes(model)["first"].tolist() == first.live_nodes().tolist()


@pytest.mark.parametrize("name", ["stem", "shortcut"])
def test_a_layer_beside_a_graph_costs_the_same_by_any_name(name):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph = NeuralGraph((2, 2), 1, wiring=Fixed(torch.tensor([[0], [2]])))
            self.add_module(name, nn.Conv2d(2, 2, 1, bias=False))

        def forward(self, x):
            return self.graph(x) + getattr(self, name)(x)

    # Input 1 is dead in the graph, but the layer beside it makes both channels of the output.
    assert {row.name: row.multiply_adds for row in cost(Residual(), (2, 4, 4)).rows} == {
        "graph": 16 * (1 + 9),
        name: 16 * 4,
    }


def test_only_a_linear_layer_on_the_outputs_loses_columns():
    model = Classifier(nn.Sequential(nn.Linear(2, 5)))
    assert cost(model, (3, 4, 4), paper=True).rows[-1] == CostRow("classifier", 15, 10)


@pytest.mark.slow
@pytest.mark.parametrize("small", [False, True])
def test_the_paper_s_count_of_a_random_graph_counted_by_numpy(small):
    model = MobileNetV1DNW(width=0.08, num_classes=7, small=small, wiring="random_graph")
    pairs = [stage.edge_index.numpy() for stage in model.stages]
    sending = [set(source) for source, _ in pairs]
    expected = 27 * sum(v < 32 for v in sending[0]) * 112**2
    expected += sum(
        (len(source) + 9 * len(senders)) * side**2
        for (source, _), senders, side in zip(pairs, sending, MAPS, strict=True)
    )
    reached = {v for v in pairs[-1][1] if v >= 1536}
    assert len(reached) < 1024
    expected += int(0.08 * 1024 * 7) if small else 7 * len(reached)
    result = cost(model, (3, 224, 224), paper=True)
    assert result.multiply_adds == expected
    assert result.multiply_adds > cost(model, (3, 224, 224)).multiply_adds


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
    norms = 2 * 16 + 2 * 16 + 2 * nodes
    assert result.parameters == sum(stem) + norms + edges + 9 * nodes + 1_010
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


def state_of(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs)) for m in model.modules()
    ]
    attributes = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
    return hooks, attributes, {key: value.tolist() for key, value in model.state_dict().items()}, torch.get_rng_state()


class Noise(nn.Module):
    """Draws random numbers, and fails where it is asked to."""

    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def forward(self, x):
        if self.fail:
            raise ValueError("no image of this kind")
        return x + torch.rand_like(x)


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("fail", [False, True])
def test_counting_leaves_the_model_as_it_was(paper, fail):
    graphs = [NeuralGraph((4, 3, 2), 9)]
    graphs += [NeuralGraph(num_nodes=3, num_inputs=2, num_outputs=1, dynamics=Continuous("rk4"))]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *graphs, nn.Dropout(), Noise(fail))
    model(torch.randn(2, 3, 5, 5)) if not fail else None
    model[1].eval()
    chosen = [graph._chosen for graph in graphs]
    modules = list(model.modules())
    hooks, attributes, state, random = state_of(model)
    if fail:
        with pytest.raises(InputError, match=r"Sequential cannot take .* \(3, 9, 9\) \(ValueError: no image of this"):
            cost(model, (3, 9, 9), paper=paper)
    else:
        assert cost(model, (3, 9, 9), paper=paper) == cost(model, (3, 9, 9), paper=paper)
    now = state_of(model)
    assert now[:3] == (hooks, attributes, state)
    assert torch.equal(now[3], random)
    assert list(model.modules()) == modules
    assert all(graph._chosen is before for graph, before in zip(graphs, chosen, strict=True))
    assert torch.backends.mha.get_fastpath_enabled()


def test_rows_are_the_stages_and_their_sum():
    model = MobileNetV1DNW(width=0.1, num_classes=10, stem_stride=1, wiring="random_graph")
    result = cost(model, (3, 16, 16))
    assert [row.name for row in result.rows] == ["stem", *(f"stage{n}" for n in range(1, 6)), "head", "classifier"]
    assert result.rows[-2:] == (CostRow("head", 2 * 1024, 0), CostRow("classifier", 10_250, 10_240))
    lines = [line.split() for line in str(result).splitlines()]
    assert lines[0] == ["part", "parameters", "multiply-adds"]
    assert lines[1:-1] == [[row.name, f"{row.parameters:,}", f"{row.multiply_adds:,}"] for row in result.rows]
    assert lines[-1] == ["total", f"{result.parameters:,}", f"{result.multiply_adds:,}"]
    assert len({len(line) for line in str(result).splitlines()}) == 1


def test_node_functions_of_blocks_have_their_own_dead_nodes():
    """Blocks (2, 2, 1) in one recurrent graph, each with a convolution of its own; 1 and 3 are dead."""
    sizes = [2, 2, 1]
    function = Blockwise([NodeConv(2, 3), NodeConv(2, 1), NodeConv(1, 5)], sizes)
    edges = torch.tensor([[0, 2], [2, 4]])
    graph = NeuralGraph(
        num_nodes=5, num_inputs=2, num_outputs=1, num_edges=2, wiring=Fixed(edges), dynamics=Discrete(steps=1),
        node_function=function,
    )  # fmt: skip
    assert cost(graph, (2, 4, 4)) == Cost((CostRow("graph", 2 + 9 + 1 + 25, 16 * (1 + 9 + 1 + 25)),))


def test_a_node_function_that_blocks_share_is_counted_where_it_is_used():
    """Blocks (2, 2, 2) with one module for the first two; 1 and 2 are dead, so that both its channels are needed."""
    graph = NeuralGraph((2, 2, 2), 2, wiring=Fixed(torch.tensor([[0, 3], [3, 4]])), node_function=NodeConv(2, 3))
    assert cost(graph, (2, 4, 4)) == Cost((CostRow("graph", 2 + 18, 16 * (2 + 18)),))


def test_products_that_no_layer_computes_are_counted_before_and_after_a_product_over_edges():
    class Mix(nn.Module):
        def send(self, z):
            return torch.einsum("uv,bvhw->buhw", torch.ones(3, 3), z)

        def forward(self, z):
            return torch.einsum("uv,bvhw->buhw", torch.ones(3, 3), z)

    graph = NeuralGraph(
        num_nodes=3, num_inputs=2, num_outputs=3, num_edges=4, dynamics=Discrete(steps=2), node_function=Mix()
    )
    assert cost(graph, (2, 4, 4)).multiply_adds == 2 * 16 * (9 + 4 + 9)


def test_parameters_that_all_nodes_share_do_not_die():
    class Scale(nn.Module):
        def __init__(self, num_nodes):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, z):
            return self.scale * z

    graph = NeuralGraph((2, 1), 1, wiring=Fixed(torch.tensor([[0], [2]])), node_function=Scale)
    assert totals(cost(graph, (2, 4, 4))) == (1 + 1, 16)


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
    assert totals(cost(nn.Sequential(model), (3, 16, 16))) == totals(cost(model, (3, 16, 16)))
