"""Pictures show what they should; PyG and networkx read the wiring as it is."""

import subprocess
import sys

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pytest
import torch
import torch_geometric.transforms as T
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.utils import contains_isolated_nodes, from_networkx, to_dense_adj
from torch_geometric.utils import to_networkx as pyg_to_networkx
from torch_geometric.visualization import visualize_graph

from dnw_graph import Discrete, InputError, NeuralGraph, sparsify
from dnw_graph.sparse_layers import to_data as layer_data
from dnw_graph.visualize import Recording, plot, plot_adjacency, plot_change, to_networkx
from dnw_graph.visualize.style import BORN, GONE, KEPT, NEGATIVE, POSITIVE
from dnw_graph.wirings import STR


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def graph():
    return NeuralGraph((3, 4, 4, 2), 24)


def lines(ax):
    return [c for c in ax.collections if isinstance(c, LineCollection)]


def dots(ax, name):
    return next(c for c in ax.collections if isinstance(c, PathCollection) and c.get_label().startswith(name))


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def edges_of(data):
    """Pairs (u, v) and their weights, as plain Python."""
    return dict(zip(map(tuple, data.edge_index.T.tolist()), data.edge_weight.tolist(), strict=True))


def drawn_edges(ax, data):
    """Pairs (u, v) of the curves of a picture, found by the positions of their ends."""
    at = {tuple(position): node for node, position in enumerate(data.pos.tolist())}
    curves = lines(ax)[0].get_segments()
    return [(at[tuple(curve[0])], at[tuple(curve[-1])]) for curve in curves]


@pytest.mark.parametrize("top", [1, 7, 24, 1000])
def test_the_strongest_edges_are_drawn_with_the_strongest_on_top(graph, top):
    data = graph.to_data()
    edges = edges_of(data)
    drawn = drawn_edges(plot(graph, top=top), data)
    # The same share between any two blocks, and at least one edge.
    block, chosen = data.block.tolist(), []
    for between in {(block[u], block[v]) for u, v in edges}:
        among = sorted(
            (pair for pair in edges if (block[pair[0]], block[pair[1]]) == between), key=lambda p: abs(edges[p])
        )
        chosen += among[-max(1, len(among) * min(top, 24) // 24) :]
    assert drawn == sorted(chosen, key=lambda pair: abs(edges[pair]))


def test_colour_is_sign_and_opacity_is_magnitude(graph):
    data = graph.to_data()
    ax = plot(data)
    weights = [edges_of(data)[pair] for pair in drawn_edges(ax, data)]
    colours = lines(ax)[0].get_colors()
    for weight, colour in zip(weights, colours, strict=True):
        assert tuple(colour[:3]) == to_rgb(POSITIVE if weight > 0 else NEGATIVE)
        opaque = data.edge_weight.abs().quantile(0.95)
        assert colour[3] == pytest.approx(min(1, float(abs(weight) / opaque)) ** 0.5, rel=1e-5)
    assert len({tuple(colour[:3]) for colour in colours}) == 2


def test_nodes_stand_at_their_positions_live_or_hollow(graph):
    data = graph.to_data()
    data.live_mask[1] = False
    ax = plot(data)
    live, dead = dots(ax, "live"), dots(ax, "dead")
    np.testing.assert_array_equal(live.get_offsets(), data.pos[data.live_mask])
    np.testing.assert_array_equal(dead.get_offsets(), data.pos[~data.live_mask])
    assert (dead.get_facecolors()[:, :3] == 1).all()
    assert (live.get_facecolors()[:, :3] < 0.5).all()


def test_title_and_legend_give_the_counts(graph):
    with torch.no_grad():
        graph.candidates.weight.fill_(0.1)
        graph.candidates.weight[:5] = -1.0
    ax = plot(graph, top=6)
    # Ties go to the lower index: block 0 → 1 in full, then block 2's inputs from the first two blocks.
    live = int(graph.to_data().live_mask.sum())
    assert ax.get_title() == (
        "graph: dnw, k = 24 of 62 candidates (39%)\ndrawn: the strongest 25% of the edges between any two blocks"
    )
    assert legend(ax) == [
        "edges with w > 0: 19",
        "edges with w < 0: 5",
        f"live nodes: {live}",
        f"dead nodes: {13 - live}",
    ]
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        "inputs\n3 nodes",
        "block 1\n4 nodes",
        "block 2\n4 nodes",
        "outputs\n2 nodes",
    ]


def test_an_edge_that_skips_blocks_passes_between_their_nodes():
    graph = NeuralGraph((4, 4, 4, 4), 96)
    data = graph.to_data()
    ax = plot(graph)
    for (u, v), curve in zip(drawn_edges(ax, data), lines(ax)[0].get_segments(), strict=True):
        skipped = data.pos[(data.block > data.block[u]) & (data.block < data.block[v])]
        distance = torch.cdist(torch.tensor(curve, dtype=torch.float32), skipped)
        assert distance.numel() == 0 or distance.min() > 0.1


def test_edges_within_a_block_are_drawn_beside_it():
    """As in graphs with cycles: a pair, a self-loop and an edge that leads back."""
    data = Data(
        edge_index=torch.tensor([[1, 2, 4], [3, 2, 0]]),
        edge_weight=torch.tensor([0.5, 1.0, 2.0]),
        num_nodes=5,
        block=torch.tensor([0, 1, 1, 1, 2]),
        pos=torch.tensor([[0, 0.5], [0.5, 1 / 6], [0.5, 0.5], [0.5, 5 / 6], [1, 0.5]]),
        live_mask=torch.ones(5, dtype=torch.bool),
    )
    ax = plot(data)
    assert drawn_edges(ax, data) in ([(1, 3), (2, 2), (4, 0)], [(1, 3), (2, 2), (0, 4)])
    pair, loop, _ = lines(ax)[0].get_segments()
    assert pair[:, 0].max() > loop[:, 0].max() > 0.51
    assert min(pair[:, 0].min(), loop[:, 0].min()) == 0.5


def test_cycles_are_drawn_by_distance_and_feedback_is_dashed():
    """0 → 2 → 3 → 5 (an output), 3 → 2 back, 2 → 2, and 4 (no path leads there) → 3."""
    graph = NeuralGraph(num_nodes=6, num_inputs=2, num_outputs=1, num_edges=6, dynamics=Discrete(3))
    pairs = torch.tensor([[0, 2, 3, 3, 2, 4], [2, 3, 5, 2, 2, 3]])
    with torch.no_grad():
        graph.candidates.weight.mul_(0.01)[graph.candidates.flat_index(pairs)] = torch.arange(1.0, 7.0)
    ax = plot(graph)
    columns = [label.get_text().split("\n")[0] for label in ax.get_xticklabels()]
    assert columns == ["no path", "inputs", "after 1", "after 2", "outputs"]
    (drawn,) = lines(ax)
    found = [
        (round(4 * curve[0, 0]), round(4 * curve[-1, 0]), dash[1] is not None)
        for curve, dash in zip(drawn.get_segments(), drawn.get_linestyle(), strict=True)
    ]
    assert found == [(1, 2, False), (2, 3, False), (3, 4, False), (2, 3, True), (2, 2, True), (0, 3, False)]
    assert legend(ax)[2:4] == ["forward: 4", "feedback: 2"]


@pytest.mark.parametrize("kind", ["cycles", "layer"])
def test_many_edges_of_cycles_or_of_a_layer_are_a_matrix(kind):
    layer = torch.nn.Linear(40, 30)
    sparsify(layer, 0.5)
    nodes = {"num_nodes": 40, "num_inputs": 4, "num_outputs": 4, "num_edges": 300}
    data = NeuralGraph(**nodes, dynamics=Discrete(2)).to_data() if kind == "cycles" else layer_data(layer, "weight")
    ax = plot(data)
    assert not lines(ax)[1:]
    assert ax.get_xlabel().startswith("source")


def test_large_graphs_are_drawn_with_ticks_in_the_given_axes():
    _, ax = plt.subplots()
    graph = NeuralGraph((64, 128, 128), 1244)
    assert plot(graph, ax=ax) is ax
    assert 390 < len(lines(ax)[0].get_segments()) <= 400
    assert dots(ax, "live").get_linewidths().max() < 4


def test_all_weights_zero_can_be_drawn(graph):
    torch.nn.init.zeros_(graph.candidates.weight)
    ax = plot(graph)
    assert (lines(ax)[0].get_colors()[:, 3] > 0.25).all()


def test_zero_weights_are_neither_positive_nor_negative():
    graph = NeuralGraph((3, 4, 4, 2), 24, wiring="random_graph")
    with torch.no_grad():
        weight = graph.candidates.weight.copy_(torch.linspace(1, 2, graph.num_candidates))
        weight[graph.real_index[:5]] *= -1
        weight[graph.real_index[5:12]] = 0
    counts = ["edges with w > 0: 12", "edges with w < 0: 5", "edges with w = 0: 7"]
    for layout in (None, nx.kamada_kawai_layout):
        assert legend(plot(graph, layout=layout))[:3] == counts
    colours = lines(plot(graph))[0].get_colors()
    grey = [colour for colour in colours if np.ptp(colour[:3]) == 0]
    assert len(grey) == 7
    assert min(colour[3] for colour in grey) > 0.25
    assert [text for text in legend(plot(NeuralGraph((3, 4, 2), 9))) if "= 0" in text] == []


def test_change_is_the_difference_of_the_edge_sets(graph):
    before = graph.to_data()
    torch.nn.init.uniform_(graph.candidates.weight, -1, 1)
    after = graph.to_data()
    old, new = set(edges_of(before)), set(edges_of(after))
    assert 0 < len(old & new) < len(new)
    ax = plot_change(before, after)
    found = {tuple(c.get_colors()[0][:3]): len(c.get_segments()) for c in lines(ax)}
    assert found == {to_rgb(KEPT): len(old & new), to_rgb(GONE): len(old - new), to_rgb(BORN): len(new - old)}
    assert legend(ax)[:3] == [
        f"edges kept: {len(old & new)}",
        f"edges gone: {len(old - new)}",
        f"edges born: {len(new - old)}",
    ]
    ax = plot_change(before, after, top=2)
    pairs = [
        {(after.block[u].item(), after.block[v].item()) for u, v in which}
        for which in (old & new, old - new, new - old)
    ]
    assert [len(c.get_segments()) for c in lines(ax)] == [len(each) for each in pairs]


def test_edges_of_a_convolution_are_positions_in_its_kernel():
    layer = nn.Conv2d(4, 6, 3)
    sparsify(layer, 0.3)
    before, first = layer_data(layer, "weight"), layer.weight != 0
    nn.init.normal_(layer.parametrizations.weight.original)
    after, last = layer_data(layer, "weight"), layer.weight != 0
    masks = (first & last, first & ~last, last & ~first)
    assert legend(plot_change(before, after))[:3] == [
        f"edges {name}: {int(mask.sum())}" for name, mask in zip(("kept", "gone", "born"), masks, strict=True)
    ]
    with pytest.raises(InputError, match=rf"^{before.num_edges} edges connect .* pairs of nodes.*to_multi=True"):
        to_networkx(before)
    assert len(pyg_to_networkx(before, to_multi=True).edges) == before.num_edges
    arrows = [each for each in plot(before, layout=nx.kamada_kawai_layout).patches if isinstance(each, FancyArrowPatch)]
    assert len(arrows) == before.num_edges


def test_no_change_is_all_kept(graph):
    assert legend(plot_change(graph.to_data(), graph.to_data()))[:3] == [
        "edges kept: 24",
        "edges gone: 0",
        "edges born: 0",
    ]


def test_networkx_holds_the_same_wiring(graph):
    data = graph.to_data()
    network = to_networkx(graph)
    assert {(u, v): w for u, v, w in network.edges(data="edge_weight")} == edges_of(data)
    assert [block for _, block in network.nodes(data="block")] == data.block.tolist()
    assert nx.is_directed_acyclic_graph(network)
    assert nx.dag_longest_path_length(network, weight=None) <= 3
    outputs = [node for node, is_output in network.nodes(data="output_mask") if is_output]
    live = set(outputs).union(*(nx.ancestors(network, node) for node in outputs))
    assert {node for node, is_live in network.nodes(data="live_mask") if is_live} == live
    back = from_networkx(network)
    assert edges_of(back) == edges_of(data)
    for key in ("block", "pos", "input_mask", "output_mask", "live_mask"):
        assert torch.equal(back[key], data[key]), key


def test_pyg_utilities_and_transforms_take_the_wiring():
    graph = NeuralGraph((6, 20, 4), 25)
    data = graph.to_data()
    data.validate(raise_on_error=True)
    touched = set(data.edge_index.flatten().tolist())
    assert 0 < len(touched) < 30
    assert data.has_isolated_nodes()
    assert contains_isolated_nodes(data.edge_index, data.num_nodes)
    dense = torch.zeros(30, 30)
    for (u, v), weight in edges_of(data).items():
        dense[u, v] = weight
    torch.testing.assert_close(to_dense_adj(data.edge_index, edge_attr=data.edge_weight, max_num_nodes=30)[0], dense)
    without = T.RemoveIsolatedNodes()(data)
    assert without.num_nodes == len(touched)
    assert without.block.tolist() == [int(data.block[node]) for node in sorted(touched)]
    both_ways = T.ToUndirected()(data)
    assert both_ways.num_edges == 50
    distances = T.Cartesian(norm=False)(data).edge_attr
    assert (distances[:, 0] <= -0.5).all() or (distances[:, 0] >= 0.5).all()


def test_pyg_batches_wirings_of_any_sizes(graph):
    cycles = NeuralGraph(num_nodes=12, num_inputs=3, num_outputs=2, num_edges=20, dynamics=Discrete(steps=2))
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Linear(6, 4))
    sparsify(model, 0.5)
    layers = [layer_data(model, f"{number}.weight") for number in range(3)]
    graphs = [graph.to_data(), NeuralGraph((3, 5, 2), 9).to_data(), cycles.to_data()]
    moments = [next(iter(Recording(each).graphs.values())).to_data() for each in (graph, cycles)]
    for several in (layers, graphs, moments):
        batch = Batch.from_data_list(several)
        assert batch.num_edges == sum(data.num_edges for data in several)
        for found, data in zip(batch.to_data_list(), several, strict=True):
            assert torch.equal(found.edge_index, data.edge_index)
            assert found.candidate_blocks == data.candidate_blocks
            assert plot(found).get_title() == plot(data).get_title()


def test_candidates_of_older_files_are_read(graph):
    data = graph.to_data()
    data.candidate_blocks = torch.tensor(data.candidate_blocks)
    assert plot_adjacency(data).get_title() == plot_adjacency(graph).get_title()


@pytest.mark.parametrize("lost", range(4))
def test_a_part_without_a_block_is_drawn(lost):
    data = NeuralGraph((3, 4, 4, 2), 60).to_data()
    part = data.subgraph(data.block != lost)
    ax = plot(part)
    names = ["inputs", "block 1", "block 2", "outputs"]
    assert [label.get_text().split("\n")[0] for label in ax.get_xticklabels()] == names[:lost] + names[lost + 1 :]
    assert set(drawn_edges(ax, part)) == set(edges_of(part))
    assert plot_change(part, part).get_title()
    with pytest.raises(InputError, match="does not contain its candidates"):
        plot_adjacency(part)


def test_pyg_draws_the_wiring_by_magnitude(graph, tmp_path):
    data = graph.to_data()
    path = tmp_path / "wiring.png"
    visualize_graph(data.edge_index, data.edge_weight.abs(), path=str(path), backend="networkx")
    picture = plt.imread(path)
    assert picture[..., :3].min() < 0.1 < 0.9 < picture[..., :3].max()


def test_a_layout_says_where_the_nodes_of_the_strongest_edges_lie(graph):
    data = graph.to_data()
    strongest = data.edge_weight.abs().argsort(descending=True)[:7]
    pairs = {
        (u, v): data.edge_weight[n]
        for n, (u, v) in zip(strongest, data.edge_index[:, strongest].T.tolist(), strict=True)
    }
    given = []

    def layout(network):
        given.append(network)
        return {node: (node, node**2) for node in network}

    ax = plot(graph, top=7, layout=layout, epoch=3)
    assert set(given[0].edges) == set(pairs)
    assert set(given[0].nodes) == {node for pair in pairs for node in pair}
    arrows = [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == 7
    ends = [tuple(round(float(end[0])) for end in arrow._posA_posB) for arrow in arrows]
    for (u, v), arrow in zip(ends, arrows, strict=True):
        assert to_rgb(arrow.get_edgecolor()) == to_rgb(POSITIVE if pairs.pop((u, v)) > 0 else NEGATIVE)
    assert not pairs
    spots = {tuple(spot) for dots in ax.collections if len(dots.get_offsets()) for spot in dots.get_offsets().tolist()}
    assert spots == {(node, node**2) for node in given[0]}
    assert "epoch 3\ndrawn: the 7 strongest edges" in ax.get_title()
    assert "drawn" not in plot(graph, layout=nx.kamada_kawai_layout).get_title()


@pytest.mark.parametrize("places", [None, {}, dict.fromkeys(range(13), (0, 0, 0)), dict.fromkeys(range(13), ("a", 0))])
def test_a_layout_without_places_is_refused(graph, places):
    with pytest.raises(
        InputError, match=r"layout must be a function that returns a position \(x, y\) for every node; got"
    ):
        plot(graph, layout=lambda network: places)


@pytest.mark.parametrize("draw", [plot, lambda graph, top: plot_change(graph.to_data(), graph.to_data(), top)])
def test_no_edges_to_draw_is_refused(graph, draw):
    with pytest.raises(InputError, match="an integer >= 1; got 0"):
        draw(graph, 0)


def test_change_between_different_graphs_is_refused(graph):
    with pytest.raises(InputError, match=r"one graph at two moments.*\[3, 4, 4, 2\] and \[3, 4\]"):
        plot_change(graph.to_data(), NeuralGraph((3, 4), 2).to_data())


@pytest.mark.parametrize(("package", "call"), [("matplotlib", plot), ("networkx", to_networkx)])
def test_a_missing_package_is_named_with_the_extra(graph, monkeypatch, package, call):
    for name in [*sys.modules]:
        if name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}.*dnw-graph\[train\]"):
        call(graph)


@pytest.mark.slow
def test_importing_the_module_imports_neither_matplotlib_nor_networkx():
    code = "import sys, dnw_graph.visualize; assert not {'matplotlib', 'networkx', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_graphs_and_data_are_told_apart(graph, unchecked):
    with pytest.raises(InputError, match="graph must be a NeuralGraph or a Data; got 'graph'"):
        plot("graph")
    for before, after in ((graph, graph), (graph.to_data(), graph), (graph, graph.to_data())):
        with pytest.raises(InputError, match=r"(before|after) must be a Data; got a NeuralGraph module"):
            plot_change(before, after)


def test_a_wiring_without_edges_and_one_in_half_precision_are_drawn(graph):
    empty = NeuralGraph((3, 4, 2), wiring=STR(start=20.0, weight_decay=0.0))
    assert empty.num_real_edges == 0
    assert not any(len(each.get_segments()) for each in lines(plot(empty.to_data())))
    assert len(lines(plot(graph.bfloat16().to_data()))) == len(lines(plot(graph.float().to_data())))
