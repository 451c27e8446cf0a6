from functools import partial
from itertools import pairwise

import pytest
import torch
from reference import relative_error
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from dnw_graph import CandidateEdges, Discrete, InputError, NeuralGraph, RandomGraph
from dnw_graph.equivalence import lstm_nodes, lstm_to_discrete, mlp_to_discrete, static_to_discrete
from dnw_graph.node_functions import NormReluConv, NormReluConvNormRelu
from dnw_graph.propagation import BlockPropagation, MessagePassingPropagation
from dnw_graph.wirings import Fixed

PROPAGATIONS = {
    "block": BlockPropagation(),
    "edge_index": MessagePassingPropagation("edge_index"),
    "csr": MessagePassingPropagation("csr"),
}


@pytest.fixture
def rows(digits):
    """Digits as vectors [8, 64]."""
    return digits[0][:8].flatten(1)


def backward(outputs):
    (outputs**3 + outputs).sum().backward()


# Perceptrons


def perceptron(sizes, activation=nn.ReLU, bias=True):
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.PReLU])
@pytest.mark.parametrize("sizes", [(64, 10), (64, 12, 10), (64, 16, 12, 10), (64, 8, 8, 8, 8, 5)])
def test_a_perceptron_is_its_discrete_graph(sizes, activation, bias, rows):
    mlp = perceptron(sizes, activation, bias)
    graph = mlp_to_discrete(mlp)
    assert isinstance(graph.dynamics, Discrete)
    assert graph.dynamics.steps == len(sizes) - 1
    assert graph.num_nodes == sum(sizes)
    assert graph.num_edges == sum(a * b for a, b in pairwise(sizes))
    inputs = [rows.clone().requires_grad_() for _ in range(2)]
    expected, found = mlp(inputs[0]), graph(inputs[1])
    assert relative_error(found, expected) < 1e-12
    backward(expected)
    backward(found)
    assert relative_error(inputs[1].grad, inputs[0].grad) < 1e-12
    layers = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    weights = torch.cat([layer.weight.grad.flatten() for layer in layers])
    assert relative_error(graph.candidates.weight.grad, weights) < 1e-12
    rest = {name: p.grad for name, p in graph.dynamics.named_parameters()}
    biases = [gradient for name, gradient in rest.items() if name.endswith("bias")]
    slopes = [gradient for name, gradient in rest.items() if name.endswith("weight")]
    for a, layer in zip(biases, layers if bias else [], strict=True):
        assert relative_error(a, layer.bias.grad) < 1e-12
    for a, prelu in zip(slopes, [m for m in mlp if isinstance(m, nn.PReLU)], strict=True):
        assert relative_error(a, prelu.weight.grad) < 1e-12


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_a_perceptron_in_every_way_of_propagation(propagation, rows):
    mlp = perceptron((64, 12, 10))
    graph = mlp_to_discrete(mlp)
    graph.propagation = PROPAGATIONS[propagation]
    assert relative_error(graph(rows), mlp(rows)) < 1e-12


def test_an_edge_of_a_perceptron_is_one_weight(rows):
    mlp = perceptron((64, 12, 10))
    graph = mlp_to_discrete(mlp)
    edges = {(u, v): w for u, v, w in zip(*graph.edge_index.tolist(), graph.edge_weight.tolist(), strict=True)}
    assert len(edges) == 64 * 12 + 12 * 10
    assert edges[5, 64 + 3] == mlp[0].weight[3, 5].item()
    assert edges[64 + 7, 76 + 9] == mlp[2].weight[9, 7].item()


def test_the_original_is_left_alone(rows):
    mlp = perceptron((64, 12, 10), nn.PReLU)
    before = [p.detach().clone() for p in mlp.parameters()]
    graph = mlp_to_discrete(mlp)
    backward(graph(rows))
    torch.optim.SGD(graph.parameters(), lr=1.0).step()
    assert all(torch.equal(a, b) for a, b in zip(before, mlp.parameters(), strict=True))
    assert all(p.grad is None for p in mlp.parameters())


def test_several_activations_and_single_precision(digits):
    mlp = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Softplus(), nn.Linear(12, 5), nn.Sigmoid())
    x = digits[0][:8].flatten(1).float()
    assert relative_error(mlp_to_discrete(mlp)(x), mlp(x)) < 1e-6


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (nn.Sequential(nn.ReLU(), nn.Linear(2, 3)), r"begins with nn.Linear; this one begins with ReLU\(\)"),
        (nn.Sequential(), "the perceptron has no nn.Linear layer"),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(4, 3)), r"Linear\(in_features=4.* cannot follow Linear"),
    ],
)
def test_what_is_no_perceptron_is_refused(mlp, message):
    with pytest.raises(InputError, match=message):
        mlp_to_discrete(mlp)


# Static graphs

SIZES = (3, 5, 4, 6, 2)


def static_graph(norm="instance", function=NormReluConv, num_edges=60, **options):
    node_function = partial(function, norm=norm)
    graph = NeuralGraph(SIZES, num_edges, node_function=node_function, **options).double()
    with torch.no_grad():
        for p in graph.dynamics.parameters():
            p.uniform_(-0.5, 1)
    return graph


def names_in_discrete(graph):
    """The name that every parameter of a static graph has in the pair of input function and discrete graph."""
    names = {"candidates.weight": "1.candidates.weight"}
    for name, _ in graph.dynamics.named_parameters():
        block, rest = name.removeprefix("node_functions.").split(".", 1)
        new = f"0.{rest}" if block == "0" else f"1.dynamics.node_functions.0.functions.{block}.{rest}"
        names[f"dynamics.{name}"] = new
    return names


def compare_static(graph, x):
    model = static_to_discrete(graph)
    assert model.training == graph.training
    assert model[1].dynamics.steps == len(SIZES) - 1
    assert model[1].dynamics.input_mode == "hold"
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected, found = graph(inputs[0]), model(inputs[1])
    assert relative_error(found, expected) < 1e-12
    assert torch.equal(model[1].edge_index, graph.edge_index)
    backward(expected)
    backward(found)
    assert relative_error(inputs[1].grad, inputs[0].grad) < 1e-9
    gradients = {name: p.grad for name, p in model.named_parameters()}
    names = names_in_discrete(graph)
    assert set(names.values()) == set(gradients)
    for name, p in graph.named_parameters():
        assert relative_error(gradients[names[name]], p.grad) < 1e-9, name
    assert gradients["1.candidates.weight"].any()
    return model


@pytest.fixture
def maps(digits):
    return digits[0][:12].view(4, 3, 8, 8)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("function", [NormReluConv, NormReluConvNormRelu])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_static_graph_is_its_discrete_graph_in_training(stride, function, propagation, maps):
    compare_static(static_graph(function=function, stride=stride, propagation=PROPAGATIONS[propagation]), maps)


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("ends", [(True, False), (False, False), (False, True), (True, True)])
def test_a_static_graph_is_its_discrete_graph_in_evaluation(ends, norm, maps, digits):
    graph = static_graph(norm, input_function=ends[0], output_function=ends[1])
    for batch in digits[0][:60].view(5, 4, 3, 8, 8):  # running statistics that are not 0 and 1
        graph(batch)
    if norm == "batch":
        assert (graph.dynamics.node_functions[1].norm.running_var - 1).abs().max() > 0.1
    compare_static(graph.eval(), maps)


def test_batch_norms_in_training_are_not_equal(maps):
    # Their statistics are those of a block whose true inputs have not arrived: the docstring says so.
    graph = static_graph("batch")
    model = static_to_discrete(graph)
    running = [graph.dynamics.node_functions[3].norm, model[1].dynamics.node_functions[0].functions[3].norm]
    graph(maps)
    model(maps)
    assert relative_error(running[1].running_mean, running[0].running_mean) > 0.1


@pytest.mark.parametrize("wiring", [RandomGraph(), RandomGraph(separate_scores=True)], ids=["weights", "scores"])
def test_a_random_graph_keeps_its_edges(wiring, maps):
    graph = static_graph(wiring=wiring)
    with torch.no_grad():
        graph.candidates.weight.uniform_(-1, 1)  # the edges are no longer those of largest |w|
    edges = graph.edge_index
    model = compare_static(graph, maps)
    assert torch.equal(model[1].edge_index, edges)
    gradient = model[1].candidates.weight.grad
    assert int((gradient != 0).sum()) <= 60


@pytest.mark.parametrize("wiring", ["set", "rigl", "gmp", "l1_anneal"])
def test_stored_edges_keep_their_weights(wiring, maps):
    graph = static_graph(wiring=wiring)
    with torch.no_grad():
        graph.candidates.weight.add_(0.1)
    graph.eval()
    model = static_to_discrete(graph)
    assert torch.equal(model[1].edge_weight, graph.edge_weight)
    assert relative_error(model(maps), graph(maps)) < 1e-12


def test_an_activation_in_place():
    mlp = nn.Sequential(nn.Linear(64, 20, bias=False), nn.ReLU(inplace=True), nn.Linear(20, 10)).double()
    graph = mlp_to_discrete(mlp)
    x = torch.rand(5, 64, dtype=torch.float64, requires_grad=True)
    assert relative_error(graph(x), mlp(x)) < 1e-12
    graph(x).sum().backward()
    assert mlp[1].inplace


def test_given_candidates_are_kept(maps):
    candidates = CandidateEdges.adjacent(SIZES)
    compare_static(static_graph(candidates=candidates, num_edges=30), maps)


def test_a_rewritten_static_graph_is_a_copy(maps):
    graph = static_graph()
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    model = static_to_discrete(graph)
    backward(model(maps))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.state_dict().items())


def test_a_graph_that_is_not_static_is_refused():
    graph = NeuralGraph(num_nodes=4, num_inputs=1, num_outputs=1, dynamics=Discrete(2), name="loop")
    with pytest.raises(InputError, match="loop: only a static graph can be rewritten; this one is Discrete"):
        static_to_discrete(graph)


# LSTMs


def compare_lstm(lstm, x):
    """Outputs, last states and gradients of an LSTM and its graph; returns the graph."""
    graph = lstm_to_discrete(lstm)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected, (h, c) = lstm(inputs[0])
    found, (found_h, found_c) = graph(inputs[1])
    for a, b in ((found, expected), (found_h, h), (found_c, c)):
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-12
    for out, h_n, c_n in ((expected, h, c), (found, found_h, found_c)):
        backward(torch.cat([out.flatten(), h_n.flatten(), 2 * c_n.flatten()]))
    assert relative_error(inputs[1].grad, inputs[0].grad) < 1e-12
    for layer in range(lstm.num_layers):
        w_ih, w_hh, biases = gradients_of_layer(graph, layer)
        assert relative_error(w_ih, getattr(lstm, f"weight_ih_l{layer}").grad) < 1e-12
        assert relative_error(w_hh, getattr(lstm, f"weight_hh_l{layer}").grad) < 1e-12
        if lstm.bias:
            # b_ih + b_hh is one bias: its gradient is that of either.
            assert relative_error(biases, getattr(lstm, f"bias_ih_l{layer}").grad) < 1e-12
            assert relative_error(biases, getattr(lstm, f"bias_hh_l{layer}").grad) < 1e-12
    return graph


def gradients_of_layer(graph, layer):
    """Gradients of W_ih, W_hh and the biases, edge by edge."""
    nodes = lstm_nodes(graph.graph.num_inputs, graph.layers, graph.hidden)
    gates, _, hidden = nodes[layer]
    below = range(graph.graph.num_inputs) if layer == 0 else nodes[layer - 1][2]
    gradient, candidates = graph.graph.candidates.weight.grad, graph.graph.candidates

    def matrix(sources):
        pairs = torch.tensor([(u, v) for v in gates for u in sources]).t()
        return gradient[candidates.flat_index(pairs)].view(len(gates), len(sources))

    return matrix(below), matrix(hidden), graph.graph.dynamics.node_functions[0].biases[layer].grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 8])
def test_an_lstm_is_its_discrete_graph(length, layers, bias, digits):
    lstm = nn.LSTM(8, 5, layers, bias=bias, batch_first=True).double()
    compare_lstm(lstm, digits[0][:4, :length])


@pytest.mark.parametrize("layers", [1, 2])
def test_time_may_come_first(layers, digits):
    compare_lstm(nn.LSTM(8, 5, layers).double(), digits[0][:4].transpose(0, 1))


def assert_same_run(lstm, x, hx=None):
    """Outputs, last states and the gradients of what it starts from."""
    graph = lstm_to_discrete(lstm)
    starts = [None if hx is None else tuple(s.clone().requires_grad_() for s in hx) for _ in range(2)]
    expected, found = lstm(x, starts[0]), graph(x, starts[1])
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-12
    if hx is not None:
        for output, (h, c) in (expected, found):
            values = output.data if isinstance(output, PackedSequence) else output
            backward(torch.cat([values.flatten(), h.flatten(), 2 * c.flatten()]))
        for a, b in zip(starts[1], starts[0], strict=True):
            assert relative_error(a.grad, b.grad) < 1e-12
    return found[0], expected[0]


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_lstm_starts_from_given_states(batch_first, layers, digits):
    lstm = nn.LSTM(8, 5, layers, batch_first=batch_first).double()
    x = digits[0][:4] if batch_first else digits[0][:4].transpose(0, 1)
    for length in (1, 8):
        part = x[:, :length] if batch_first else x[:length]
        found, expected = assert_same_run(lstm, part, torch.randn(2, layers, 4, 5).double().unbind())
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_a_sequence_without_a_batch(given, batch_first, digits):
    lstm = nn.LSTM(8, 5, 2, batch_first=batch_first).double()
    found, expected = assert_same_run(lstm, digits[0][0], torch.randn(2, 2, 5).double().unbind() if given else None)
    assert found.shape == expected.shape == (8, 5)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("lengths", [(8, 5, 5, 1), (2, 7, 1, 7)])
def test_packed_sequences(lengths, given, digits):
    lstm = nn.LSTM(8, 5, 2, batch_first=True).double()
    rows = [row[:length] for row, length in zip(digits[0], lengths, strict=False)]
    packed = pack_sequence(rows, enforce_sorted=list(lengths) == sorted(lengths, reverse=True))
    found, expected = assert_same_run(lstm, packed, torch.randn(2, 2, 4, 5).double().unbind() if given else None)
    assert relative_error(found.data, expected.data) < 1e-12
    assert torch.equal(found.batch_sizes, expected.batch_sizes)
    for name in ("sorted_indices", "unsorted_indices"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a is b is None or torch.equal(a, b)


def test_a_sequence_in_two_parts(digits):
    graph = lstm_to_discrete(nn.LSTM(8, 5, 2, batch_first=True).double())
    x = digits[0][:4]
    first, state = graph(x[:, :3])
    second, last = graph(x[:, 3:], state)
    whole, expected = graph(x)
    assert relative_error(torch.cat([first, second], dim=1), whole) < 1e-12
    assert relative_error(torch.stack(last), torch.stack(expected)) < 1e-12


def test_states_of_another_size_are_refused(digits):
    graph = lstm_to_discrete(nn.LSTM(8, 5, 2, batch_first=True).double())
    start = torch.zeros(2, 3, 5).double()
    with pytest.raises(InputError, match=r"lstm: h and c at the start must be \[2, 4, 5\] each; got \[2, 3, 5\]"):
        graph(digits[0][:4], (start, start))


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_an_lstm_in_every_way_of_propagation(propagation, digits):
    lstm = nn.LSTM(8, 5, 2, batch_first=True).double()
    graph = lstm_to_discrete(lstm)
    graph.graph.propagation = PROPAGATIONS[propagation]
    assert relative_error(graph(digits[0][:4])[0], lstm(digits[0][:4])[0]) < 1e-12


def test_one_edge_per_weight():
    graph = lstm_to_discrete(nn.LSTM(3, 5, 2)).graph
    assert graph.num_nodes == 3 + 2 * 6 * 5
    # W_ih and W_hh of both layers, and an edge of every cell to itself.
    assert graph.num_edges == 20 * (3 + 5) + 20 * (5 + 5) + 2 * 5
    loops = graph.edge_index[0] == graph.edge_index[1]
    assert int(loops.sum()) == 10
    assert (graph.edge_weight[loops] == 1).all()


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize(("kind", "row", "column"), [("ih", 4, 2), ("ih", 13, 4), ("hh", 7, 3), ("hh", 19, 4)])
def test_removing_an_edge_is_setting_a_weight_to_zero(kind, row, column, length, digits):
    lstm = nn.LSTM(8, 5, batch_first=True).double()
    graph = lstm_to_discrete(lstm)
    x = digits[0][:4, 1 : 1 + length]
    full = graph(x)[0]
    gates, _, hidden = lstm_nodes(8, 1, 5)[0]
    source, target = (column if kind == "ih" else hidden[column]), gates[row]
    edges = graph.graph.edge_index
    remaining = edges[:, (edges[0] != source) | (edges[1] != target)]
    assert remaining.size(1) == edges.size(1) - 1
    graph.graph.rewire(Fixed(remaining), remaining.size(1))
    with torch.no_grad():
        getattr(lstm, f"weight_{kind}_l0")[row, column] = 0
    assert relative_error(graph(x)[0], lstm(x)[0]) < 1e-12
    if kind == "ih" or length > 1:  # at the first element there is no h yet
        assert relative_error(graph(x)[0], full) > 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": True}, "a bidirectional LSTM is two graphs, one per direction"),
        ({"proj_size": 2}, r"projections \(proj_size = 2\) is not supported; use proj_size=0"),
        ({"num_layers": 2, "dropout": 0.5}, r"dropout between layers \(0.5\) is not supported; use dropout=0"),
    ],
)
def test_what_is_no_plain_lstm_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        lstm_to_discrete(nn.LSTM(3, 5, **options))


def test_sequences_of_another_width_are_refused():
    with pytest.raises(InputError, match=r"lstm: the input must be .* \[batch, time, 3, …\] .*got .* \[2, 4, 5\]"):
        lstm_to_discrete(nn.LSTM(3, 5, batch_first=True))(torch.zeros(2, 4, 5))


def test_single_precision_follows_the_lstm(digits):
    lstm = nn.LSTM(8, 5, 2, batch_first=True)
    x = digits[0][:4].float()
    found = lstm_to_discrete(lstm)(x)[0]
    assert found.dtype == torch.float32
    assert relative_error(found, lstm(x)[0]) < 1e-5


def test_node_functions_that_write_in_place_are_copied_without():
    function = nn.Sequential(nn.ReLU(inplace=True))
    graph = NeuralGraph((4, 8, 4), 20, node_function=function, output_function=True).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    discrete = static_to_discrete(graph)
    torch.testing.assert_close(discrete(x.clone()), graph(x.clone()))
    discrete(x.clone()).sum().backward()
    assert all(each.inplace for each in graph.modules() if isinstance(each, nn.ReLU))
