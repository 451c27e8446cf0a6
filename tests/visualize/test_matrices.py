"""Matrices show the edges and the shares that there are, in cells that never reach over a block."""

from itertools import pairwise

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from torch import nn
from torch_geometric.data import Data

from dnw_graph import CandidateEdges, Discrete, InputError, NeuralGraph, sparsify
from dnw_graph.sparse_layers import to_data
from dnw_graph.visualize import Recording, plot_adjacency, plot_layers
from dnw_graph.visualize.style import FEEDBACK, KEPT, NEGATIVE, POSITIVE


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def cells(ax):
    """The bounds of the cells and their values, NaN where there is none."""
    mesh = ax.collections[0]
    values = np.ma.filled(mesh.get_array().astype(float), np.nan)
    return mesh.get_coordinates()[0, :, 0], values


def hatched(ax):
    return {(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in ax.patches if p.get_hatch()}


@pytest.mark.parametrize("layered", [False, True])
def test_cells_of_a_small_graph_are_its_weights(layered):
    sizes = (3, 4, 2)
    graph = NeuralGraph(sizes, 9, candidates=CandidateEdges.adjacent(sizes) if layered else None)
    ax = plot_adjacency(graph)
    data = graph.to_data()
    edges = dict(zip(map(tuple, data.edge_index.T.tolist()), data.edge_weight.tolist(), strict=True))
    _, values = cells(ax)
    for v in range(9):
        for u in range(9):
            assert values[v, u] == pytest.approx(edges.get((u, v), np.nan), nan_ok=True)
    expected = {(0, 0, 3, 3), (3, 0, 4, 3), (7, 0, 2, 3), (3, 3, 4, 4), (7, 3, 2, 4), (7, 7, 2, 2)}
    assert hatched(ax) == expected | ({(0, 7, 3, 2)} if layered else set())
    # Sources of blocks 0 and 1 across, targets of blocks 1 and 2 downwards.
    assert ax.get_xlim() == (0, 7)
    assert ax.get_ylim() == (9, 3)
    assert ax.get_title() == f"graph: dnw, k = 9 of {20 if layered else 26} candidates ({45 if layered else 35}%)"


def test_the_weakest_real_edge_differs_from_white():
    graph = NeuralGraph((2, 2), 4, input_function=False)
    with torch.no_grad():
        graph.candidates.weight.copy_(torch.tensor([1.0, -1e-6, 1e-6, -1.0]))
    mesh = plot_adjacency(graph).collections[0]
    _, negative, positive, _ = mesh.to_rgba(mesh.get_array())[2:, :2, :3].reshape(4, 3)
    assert negative.min() < 0.9
    assert positive.min() < 0.9
    assert np.argmax(negative) == np.argmax(to_rgb(NEGATIVE))
    assert np.argmax(positive) == np.argmax(to_rgb(POSITIVE))


def test_zero_weights_are_grey():
    graph = NeuralGraph((2, 3, 2), 12, wiring="random_graph")
    with torch.no_grad():
        graph.candidates.weight[graph.real_index[:4]] = 0
    ax = plot_adjacency(graph)
    ax.figure.canvas.draw()
    picture = np.asarray(ax.figure.canvas.buffer_rgba())[::-1, :, :3] / 255
    data = graph.to_data()
    colours = {0: KEPT, 1: POSITIVE, -1: NEGATIVE}
    for (u, v), weight in zip(data.edge_index.T.tolist(), data.edge_weight.tolist(), strict=True):
        x, y = ax.transData.transform((u + 0.25, v + 0.25)).astype(int)
        near = {sign: np.abs(picture[y, x] - to_rgb(colour)).max() for sign, colour in colours.items()}
        assert (min(near, key=near.get) == 0) == (weight == 0)
        assert weight or near[0] < 0.01
    assert "grey: 0" in ax.figure.axes[1].get_ylabel()


@pytest.mark.parametrize(("sizes", "even"), [((64, 192, 256), True), ((60, 171, 200), False)])
def test_cells_of_a_large_graph_divide_its_blocks(sizes, even):
    graph = NeuralGraph(sizes, 3000)
    ax = plot_adjacency(graph)
    bounds, values = cells(ax)
    assert set(np.cumsum(sizes)) <= set(bounds.astype(int))
    assert (len({*np.diff(bounds)}) == 1) == even
    assert ("about" in ax.figure.axes[1].get_ylabel()) != even
    nodes = sum(sizes)
    real, possible = np.zeros((nodes, nodes)), np.zeros((nodes, nodes))
    real[tuple(graph.edge_index.flip(0).numpy())] = 1
    ends = np.cumsum((0, *sizes))
    for start, stop in pairwise(ends[1:]):
        possible[start:stop, :start] = 1
    for row, (top, bottom) in enumerate(zip(bounds[:-1].astype(int), bounds[1:].astype(int), strict=True)):
        for column, (left, right) in enumerate(zip(bounds[:-1].astype(int), bounds[1:].astype(int), strict=True)):
            part = possible[top:bottom, left:right]
            assert part.all() or not part.any()
            share = real[top:bottom, left:right].sum() / part.sum() if part.any() else np.nan
            assert values[row, column] == pytest.approx(share, nan_ok=True)


def test_every_block_has_its_share_in_numbers():
    graph = NeuralGraph((20, 30, 40), 500)
    block, written = graph.to_data().block, {}
    for text in plot_adjacency(graph).texts:
        x, y = text.get_position()
        written[int(block[int(x)]), int(block[int(y)])] = text.get_text()
    for (source, target), text in written.items():
        u, v = graph.edge_index
        real = int(((block[u] == source) & (block[v] == target)).sum())
        share = real / ((20, 30, 40)[source] * (20, 30, 40)[target])
        assert float(text.removesuffix("%")) == pytest.approx(100 * share, abs=0.51)
    assert set(written) == {(0, 1), (0, 2), (1, 2)}


def test_cycles_are_ordered_by_distance_and_their_edges_counted():
    graph = NeuralGraph(num_nodes=30, num_inputs=4, num_outputs=5, num_edges=60, dynamics=Discrete(4))
    ax = plot_adjacency(graph)
    names = [label.get_text().split("\n")[0].split()[0] for label in ax.get_xticklabels()]
    assert names[-1] == "outputs"
    _, values = cells(ax)
    assert np.isfinite(values).sum() == 60
    # Distances by a plain search, outputs last.
    edges = list(map(tuple, graph.edge_index.T.tolist()))
    distance, now = dict.fromkeys(range(4), 0), set(range(4))
    while now:
        now = {v for u, v in edges if u in now and v not in distance}
        distance |= dict.fromkeys(now, max(distance.values()) + 1)
    rank = {node: 99 if node >= 25 else distance.get(node, -1) for node in range(30)}
    forward = sum(rank[v] > rank[u] for u, v in edges)
    assert f"{forward} edges lead forward, {60 - forward} lead back or stay" in ax.get_xlabel()
    assert any(to_rgb(patch.get_facecolor()) == to_rgb(FEEDBACK) for patch in ax.patches)


def test_a_moment_of_a_large_graph_has_no_weights_and_is_shown_by_shares():
    recording = Recording(NeuralGraph((64, 128), 4100))
    ax = plot_adjacency(recording["graph"].to_data())
    assert "real share" in ax.figure.axes[1].get_ylabel()
    assert "epoch 0" in ax.get_title()


def test_the_title_has_the_epoch_that_is_given():
    graph = NeuralGraph((3, 4, 2), 9)
    assert plot_adjacency(graph).get_title() == "graph: dnw, k = 9 of 26 candidates (35%)"
    data = graph.to_data()
    assert plot_adjacency(data, epoch=2.5).get_title() == "graph: dnw, k = 9 of 26 candidates (35%), epoch 2.5"
    assert "epoch" not in data


def test_layers_are_blocks_with_their_shares():
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 16, 1), nn.Linear(500, 40))
    sparsify(model, 0.2)
    figure = plot_layers(model, epoch=4)
    kept = sum(to_data(model, name).num_edges for name in ("0.weight", "2.weight", "3.weight"))
    assert figure.get_suptitle() == f"Sequential: dnw, k = {kept:,} of 20,408 weights (20%) in 3 layers, epoch 4"
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == [
        "0.weight\n12×2×3×3, 20% kept",
        "2.weight\n16×12×1×1, 20% kept",
        "3.weight\n40×500, 20% kept",
    ]
    _, values = cells(axes[0])
    # Groups of a convolution: only channels of the same group are candidates.
    there = np.isfinite(values[8:, :8])
    assert there.sum() == 4 * 2 * 3
    data = to_data(model, "0.weight")
    count = np.zeros((20, 20))
    np.add.at(count, tuple(data.edge_index.flip(0).numpy()), 1)
    np.testing.assert_allclose(values[8:, :8][there], (count / 9)[8:, :8][there], rtol=1e-6)
    assert len([ax for ax in plot_layers(model, ["3.weight"]).axes if ax.get_title()]) == 1


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="does not contain its candidates"):
        plot_adjacency(Data(edge_index=torch.tensor([[0], [1]]), num_nodes=2))
    with pytest.raises(InputError, match="has no sparse layer to draw: call sparsify first"):
        plot_layers(nn.Linear(2, 2))
    layer = nn.Linear(4, 4)
    sparsify(layer, 0.5)
    with pytest.raises(InputError, match="unknown sparse weight 'bias'"):
        plot_layers(layer, ["bias"])
