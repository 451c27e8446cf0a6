"""Weights as candidates and as bipartite graphs, against the layers themselves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch_geometric.utils import to_networkx

from dnw_graph import STR, Fixed, InputError, TargetedDropout
from dnw_graph.sparse_layers import sparsify, to_data, weight_graphs
from dnw_graph.sparse_layers.budget import edges_per_weight
from dnw_graph.sparse_layers.layers import find_weights
from dnw_graph.visualize import plot

LAYERS = {
    "linear": lambda: nn.Linear(3, 4),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "conv2d": lambda: nn.Conv2d(2, 4, (2, 3)),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "conv3d": lambda: nn.Conv3d(2, 2, (1, 2, 3)),
    "up1d": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "up2d": lambda: nn.ConvTranspose2d(2, 3, (2, 3)),
    "up3d": lambda: nn.ConvTranspose3d(2, 2, (1, 2, 3), groups=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_edges_are_the_channels_that_a_layer_connects(name):
    """A unit impulse in one input channel reaches an output channel by the weights of their edges, place by place."""
    layer = LAYERS[name]().double()
    nn.init.zeros_(layer.bias)
    sparsify(layer, 0.4)
    data = to_data(layer, "weight")
    assert data.validate()
    dims = layer.weight.dim() - 2
    without, places = data.kernel_position.split((3 - dims, dims), dim=1)
    assert not without.any()
    edges = list(zip(*data.edge_index.tolist(), map(tuple, places.tolist()), strict=True))
    assert len(edges) == len(set(edges)) == int(layer.weight.ne(0).sum())
    inputs = int(data.input_mask.sum())
    for channel in range(inputs):
        x = torch.zeros(1, inputs, *[7] * dims, dtype=torch.float64)
        x[(0, channel, *[3] * dims)] = 1
        out = layer(x)[0]
        expected = torch.zeros_like(out)
        for (source, target, place), weight in zip(edges, data.edge_weight, strict=True):
            if source == channel:
                # A convolution looks back from its output, a transposed one spreads forward.
                at = [3 + p if "up" in name else 3 - p for p in place]
                expected[(target - inputs, *at)] += weight
        torch.testing.assert_close(out, expected)


def test_the_weight_of_an_edge_is_the_value_that_the_layer_computes_with():
    layer = nn.Linear(6, 4)
    sparsify(layer, wiring=STR(-2.0))
    data = to_data(layer, "weight")
    source, target = data.edge_index
    assert 0 < data.num_edges < 24
    assert torch.equal(layer.weight[target - 6, source], data.edge_weight)


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_as_a_vector_and_back(name):
    (weight,) = find_weights(LAYERS[name]())
    flat = weight.flat(weight.parameter)
    assert torch.equal(weight.shaped(flat), weight.parameter)
    assert torch.equal(weight.parameter.take(weight.positions(torch.arange(weight.numel))), flat)
    # One row per output channel, as rules that look at a node's own candidates expect.
    kind = "up" if "up" in name else "plain"
    rows = flat.view(weight.channels[1], -1)
    layer = weight.layer
    for target in range(weight.channels[1]):
        if kind == "plain":
            own = layer.weight[target].flatten()
        else:
            group, within = divmod(target, layer.weight.shape[1])
            size = layer.in_channels // layer.groups
            own = layer.weight[group * size : (group + 1) * size, within].flatten()
        assert torch.equal(rows[target], own)


def test_projections_as_graphs():
    attention = nn.MultiheadAttention(4, 1)
    sparsify(attention, 0.5)
    for third, letter in enumerate("qkv"):
        data = to_data(attention, f"in_proj_weight.{letter}")
        weight = attention.in_proj_weight.chunk(3)[third]
        dense = torch.zeros(4, 4)
        dense[data.edge_index[1] - 4, data.edge_index[0]] = data.edge_weight
        assert torch.equal(dense, weight)
    for weight in list(find_weights(nn.MultiheadAttention(4, 1)))[:3]:
        flat = weight.parameter.take(weight.positions(torch.arange(weight.numel)))
        assert torch.equal(flat, weight.flat(weight.parameter))
    with pytest.raises(InputError, match="unknown sparse weight 'in_proj_weight'"):
        to_data(attention, "in_proj_weight")


def test_dead_inputs_are_not_live():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.1, 0.1], [2.0, 0.1, 3.0]]))
    sparsify(layer, 0.5)
    assert to_data(layer, "weight").live_mask.tolist() == [True, False, True, True, True]


def test_a_layer_can_be_drawn_and_converted():
    layer = nn.Conv2d(3, 4, 3)
    sparsify(layer, 0.5)
    data = to_data(layer, "weight")
    assert plot(data).get_title() == "weight: dnw, k = 54 of 108 candidates (50%)"
    network = to_networkx(data, to_multi=True, edge_attrs=["edge_weight", "kernel_position"])
    found = torch.zeros(4, 3, 3, 3)
    for source, target, edge in network.edges(data=True):
        found[(target - 3, source, *edge["kernel_position"][1:])] = edge["edge_weight"]
    assert torch.equal(found, layer.weight)


def test_a_rule_sees_the_weights_of_one_output_channel_as_one_node():
    """Regular targeted dropout keeps a share of every output channel, here of a transposed convolution in groups."""
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    sparsify(layer, 0.5, TargetedDropout(variant="regular"))
    layer.eval()
    per_output = layer.weight.unflatten(0, (2, 2)).ne(0).sum(dim=(1, 3, 4)).flatten()
    assert per_output.tolist() == [9] * 6


def test_given_edges():
    layer = nn.Linear(3, 2)
    edges = torch.tensor([[0, 1, 2], [3, 4, 3]])
    sparsify(layer, 0.5, Fixed(edges))
    assert layer.weight.ne(0).tolist() == [[True, False, True], [False, True, False]]


def test_one_ranking_of_all_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ConvTranspose1d(4, 2, 3), nn.MultiheadAttention(4, 1))
    with torch.no_grad():
        model[0].weight.mul_(100)
    table = sparsify(model, 0.2, distribution="global")
    every = torch.cat([p.flatten() for name, p in model.named_parameters() if "original" in name])
    assert sum(row.kept for row in table.sparse) == len(every) - int(0.8 * len(every) + 1e-9)
    threshold = every.abs().sort(descending=True).values[table.kept - 1]
    weights = (model[0].weight, model[2].weight, model[3].in_proj_weight, model[3].out_proj.weight)
    assert sum(int(weight.ne(0).sum()) for weight in weights) == table.kept
    assert all(weight[weight.ne(0)].abs().min() >= threshold for weight in weights if weight.ne(0).any())
    assert list(weight_graphs(model)) == ["all layers"]
    assert to_data(model, "0.weight").num_edges == int(model[0].weight.ne(0).sum()) == table.rows[0].kept


@pytest.mark.parametrize("distribution", ["uniform", "global"])
def test_names_are_those_in_the_module_that_is_asked(distribution):
    """Two parts that were made sparse one by one, with layers of the same names."""
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(3, 4), nn.MultiheadAttention(4, 1)) for name in "ab"})
    for density, part in zip((0.25, 0.5), model.values(), strict=True):
        sparsify(part, density, distribution=distribution)
    weights = ("0.weight", "1.in_proj_weight.q", "1.in_proj_weight.k", "1.in_proj_weight.v", "1.out_proj.weight")
    parts = [f"{name}.{weight}" for name in "ab" for weight in weights]
    graphs = weight_graphs(model)
    assert list(graphs) == (parts if distribution == "uniform" else ["all layers", "b.0.weight"])
    assert sum(graph.num_real_edges for graph in graphs.values()) == 76 // 4 + 76 // 2
    for name in parts:
        part, own = name.split(".", 1)
        assert torch.equal(to_data(model, name).edge_weight, to_data(model[part], own).edge_weight)
    expected = model["b"][0].weight
    data = to_data(model, "b.0.weight")
    found = torch.zeros(4, 3)
    found[data.edge_index[1] - 3, data.edge_index[0]] = data.edge_weight
    assert torch.equal(found, expected)


class Shapes(nn.Module):
    """Layers of given shapes, without memory."""

    def __init__(self, shapes):
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(
                nn.Conv2d(shape[1], shape[0], shape[2:]) if len(shape) == 4 else nn.Linear(shape[1], shape[0])
                for shape in shapes
            )


sides = st.integers(1, 40)
shapes = st.one_of(st.tuples(sides, sides), st.tuples(sides, sides, st.integers(1, 5), st.integers(1, 5)))


@given(st.lists(shapes, min_size=1, max_size=8), st.integers(1, 99), st.sampled_from(["", "_kernel"]))
def test_erdos_renyi_meets_the_budget_and_its_proportions(shapes, percent, kernel):
    weights = list(find_weights(Shapes(shapes)))
    total = sum(weight.numel for weight in weights)
    budget = total - (100 - percent) * total // 100
    if budget < len(weights):
        with pytest.raises(InputError):
            edges_per_weight(weights, percent / 100, "erdos_renyi" + kernel)
        return
    edges = edges_per_weight(weights, percent / 100, "erdos_renyi" + kernel)
    assert sum(edges) == budget
    # Where neither bound holds, density · product of the sides / sum of the sides is one number.
    bounds, free = [], []
    for count, weight in zip(edges, weights, strict=True):
        assert 1 <= count <= weight.numel
        sides = weight.shape if kernel else weight.shape[:2]
        scale = sum(sides) / sides.numel() * weight.numel
        if 1 < count < weight.numel:
            free.append(((count - 1) / scale, (count + 1) / scale))
        elif count == weight.numel > 1:
            bounds.append((count - 1) / scale)
    assert max((low for low, _ in free), default=0) <= min((high for _, high in free), default=1e9)
    # A dense layer is dense because its share asks for no less.
    assert max(bounds, default=0) <= min((high for _, high in free), default=1e9)


def test_densities_by_pattern():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    table = sparsify(model, 0.5, distribution={"0.*": 0.2, "[01].weight": 0.3})
    assert [row.kept for row in table.rows] == [20, 30, 50]


class Shared(nn.Module):
    """A layer that has two names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = self.layers[1]

    def forward(self, x):
        return self.head(self.layers[0](x).relu())


def test_a_layer_is_known_by_every_name_that_it_has():
    for name in ("layers.1", "head", "head.weight"):
        table = sparsify(Shared(), 0.5, skip=name)
        assert [row.name for row in table.sparse] == ["layers.0.weight"]
    for pattern in ("layers.1.*", "head.*"):
        table = sparsify(Shared(), 0.5, distribution={pattern: 0.25})
        assert [row.kept for row in table.sparse] == [18, 9]
    model = Shared()
    sparsify(model, 0.5)
    graphs = weight_graphs(model)
    assert list(graphs) == ["layers.0.weight", "layers.1.weight", "head.weight"]
    assert graphs["head.weight"] is graphs["layers.1.weight"]
    assert to_data(model, "head.weight").num_edges == to_data(model, "layers.1.weight").num_edges == 18


def test_weights_alone_come_from_dense_and_sparse_states_of_another_number_of_edges():
    dense, sparse, model = (nn.Sequential(nn.Linear(6, 4), nn.MultiheadAttention(4, 2)) for _ in range(3))
    sparsify(sparse, 0.25)
    sparsify(model, 0.5)
    for state, source in ((dense.state_dict(), dense), (sparse.state_dict(), sparse)):
        for name, graph in weight_graphs(model).items():
            graph.load_weights(state)
            other = weight_graphs(source).get(name) if source is sparse else None
            path = name.rpartition(".")[0] if graph.weights[0].third is not None else name
            expected = other.candidate_weight if other else graph.weights[0].flat(source.get_parameter(path))
            assert torch.equal(graph.candidate_weight, expected)
            assert graph.num_real_edges == graph.num_candidates // 2
    for wrong in ({}, {"0.weight": torch.zeros(3, 3)}, {"0.weight": None}):
        with pytest.raises(InputError, match=r"0\.weight: the state must be the 24 candidate weights"):
            weight_graphs(model)["0.weight"].load_weights(wrong)


@pytest.mark.parametrize("kind", ["linear", "attention"])
@pytest.mark.parametrize("sparse", [False, True])
def test_weights_are_found_by_every_name_of_their_layer(kind, sparse):
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 4) if kind == "linear" else nn.MultiheadAttention(4, 2)])
            self.head = self.layers[0]

    model, other = Aliased(), Aliased()
    sparsify(model, 0.5)
    if sparse:
        sparsify(other, 0.5)
    state = {name: value for name, value in other.state_dict().items() if name.startswith("head.")}
    for graph in weight_graphs(model).values():
        graph.load_weights(state)
    loaded, expected = ({p.shape: p for p in each.parameters() if p.dim() == 2} for each in (model, other))
    assert all(torch.equal(weight, expected[shape]) for shape, weight in loaded.items())
