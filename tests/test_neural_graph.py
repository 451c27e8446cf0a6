import math

import networkx as nx
import numpy as np
import pytest
import torch
from pairs import every_value
from reference import candidate_gradient, plain_forward, relative_error, static_pairs, top_k
from torch import nn
from torch.func import functional_call
from torch_geometric.utils import to_networkx

from dnw_graph import CandidateEdges, Discrete, InputError, NeuralGraph, RandomGraph
from dnw_graph.models import TinyClassifier

SIZES = (3, 4, 4, 2)
PAIRS = static_pairs(SIZES)
K = 15
PROPAGATIONS = ["block", "message_passing"]


def make_graph(**options):
    return NeuralGraph(SIZES, K, **options).double()


def real_mask(graph):
    mask = torch.zeros(graph.num_candidates, dtype=torch.bool)
    mask[graph.real_index] = True
    return mask


@every_value(rest=pytest.mark.slow, propagation=PROPAGATIONS, training=[True, False])
def test_gradients_of_states_and_real_edges_are_numerically_right(propagation, training):
    graph = make_graph(propagation=propagation).train(training)
    real = graph.real_index
    weight = graph.candidates.weight.detach()
    threshold = weight.abs()[real].min()
    assert weight.abs()[~real_mask(graph)].max() < threshold - 1e-4  # a small step changes no edge

    def run(x, real_weight):
        return functional_call(graph, {"candidates.weight": weight.index_copy(0, real, real_weight)}, (x,))

    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, weight[real].requires_grad_()))


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_hallucinated_gradient_worked_by_hand(propagation):
    # Inputs a, b; one node m; outputs p, q. Real: a→m (2), m→p (3), b→q (-4). Hallucinated: all others.
    graph = NeuralGraph((2, 1, 2), 3, node_function=nn.Identity(), propagation=propagation).double()
    order = [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (0, 4), (1, 4), (2, 4)]
    assert graph.candidates.pairs(torch.arange(8)).T.tolist() == [list(pair) for pair in order]
    graph.candidates.weight.data = torch.tensor([2, 0.5, 0.1, -0.2, 3, 0.3, -4, 1], dtype=torch.float64)
    a, b = 5.0, 7.0
    x = torch.tensor([[a, b]], dtype=torch.float64, requires_grad=True)
    p, q = graph(x)[0]
    assert (p.item(), q.item()) == (3 * 2 * a, -4 * b)
    (10 * p + q).backward()
    dp, dq, dm = 10, 1, 10 * 3  # ∂L/∂I at p, at q, and at m through the real edge m→p alone
    m = 2 * a
    by_hand = {(0, 2): a * dm, (1, 2): b * dm, (0, 3): a * dp, (1, 3): b * dp, (2, 3): m * dp}
    by_hand |= {(0, 4): a * dq, (1, 4): b * dq, (2, 4): m * dq}
    assert graph.candidates.weight.grad.tolist() == [by_hand[pair] for pair in order]
    assert x.grad.tolist() == [[2 * dm, -4 * dq]]


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_every_candidate_gets_the_gradient_of_the_update_rule(propagation):
    graph = make_graph(propagation=propagation, node_function=nn.Tanh())
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    (graph(x) ** 3).sum().backward()
    weights = graph.candidates.weight.tolist()
    edges = {PAIRS[i]: weights[i] for i in top_k(weights, K)}
    last = sum(SIZES[:-1])
    states, offsets = plain_forward(x, SIZES, edges, lambda v, received: received if v >= last else received.tanh())
    (torch.stack(states[last:]) ** 3).sum().backward()
    by_hand = [candidate_gradient(states, offsets, u, v) for u, v in PAIRS]
    assert relative_error(graph.candidates.weight.grad, torch.tensor(by_hand, dtype=torch.float64)) < 1e-10
    assert any(gradient != 0 for i, gradient in enumerate(by_hand) if not real_mask(graph)[i])


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_nothing_flows_through_hallucinated_edges(propagation):
    graph = make_graph(propagation=propagation)
    hallucinated = ~real_mask(graph)
    results = []
    for factor in (1.0, -0.5, 0.0):  # other hallucinated weights, down to none at all
        graph.zero_grad()
        with torch.no_grad():
            graph.candidates.weight[hallucinated] *= factor
        x = torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 3, 4, 4).requires_grad_()
        out = graph(x)
        (out**2).sum().backward()
        results.append((out, x.grad, [p.grad for p in graph.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def test_gradient_of_states_is_that_of_the_network_without_hallucinated_edges():
    graph = make_graph(node_function=nn.Identity())
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    out = graph(x)
    # Without node functions the states solve z = A z + x, where A holds the real edges alone.
    adjacency = torch.zeros(13, 13, dtype=torch.float64)
    for (u, v), w in zip(graph.edge_index.T.tolist(), graph.edge_weight.tolist(), strict=True):
        adjacency[v, u] = w
    response = torch.linalg.inv(torch.eye(13, dtype=torch.float64) - adjacency)[-2:, :3]
    torch.testing.assert_close(out, x @ response.T, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(out)
    out.backward(g)
    torch.testing.assert_close(x.grad, g @ response, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("height_width", [(8, 8), (7, 5), (1, 1)])
def test_shape_of_the_output(stride, height_width):
    graph = NeuralGraph((3, 4, 2), 9, stride=stride)
    expected = [math.ceil(size / stride) for size in height_width]
    assert graph(torch.randn(2, 3, *height_width)).shape == (2, 2, *expected)


def test_candidate_weights_are_one_flat_entry_of_the_state_dict():
    graph = make_graph(node_function=nn.Tanh())
    assert list(graph.state_dict()) == ["num_edges", "rule", "candidates.weight"]
    assert graph.state_dict()["candidates.weight"].shape == (len(PAIRS),)
    assert [name for name, _ in graph.named_parameters()] == ["candidates.weight"]


def test_sizes_are_readable():
    graph = make_graph()
    assert (graph.num_nodes, graph.num_inputs, graph.num_outputs) == (13, 3, 2)
    assert (graph.num_candidates, graph.num_edges, graph.blocks) == (len(PAIRS), K, SIZES)
    assert not graph.edge_weight.requires_grad


def build_and_train(seed):
    torch.manual_seed(seed)
    graph = make_graph()
    optimiser = torch.optim.SGD(graph.parameters(), lr=0.5, momentum=0.9)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for _ in range(3):
        optimiser.zero_grad()
        graph(x).square().mean().backward()
        optimiser.step()
    return [graph.edge_index, graph(x), *graph.state_dict().values()]


def test_same_seed_same_wiring_and_numbers():
    first, second, other = build_and_train(1), build_and_train(1), build_and_train(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_evaluation_equals_training_where_no_norm_tells_them_apart():
    graph = make_graph(node_function=nn.Tanh())
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(graph(x), graph.eval()(x))


def test_to_data_is_a_valid_pyg_graph():
    graph = make_graph()
    data = graph.to_data()
    assert data.validate()
    assert data.num_nodes == 13
    assert torch.equal(data.edge_index, graph.edge_index)
    assert torch.equal(data.edge_weight, graph.edge_weight)
    assert data.block.tolist() == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 2
    assert data.input_mask.nonzero().flatten().tolist() == [0, 1, 2]
    assert data.output_mask.nonzero().flatten().tolist() == [11, 12]
    assert data.pos.shape == (13, 2)
    assert data.pos.min() >= 0
    assert data.pos.max() <= 1
    assert len({tuple(place) for place in data.pos.tolist()}) == 13
    network = to_networkx(data)
    reach = {v: bool({11, 12} & {v, *nx.descendants(network, v)}) for v in network}
    assert data.live_mask.tolist() == [reach[v] for v in range(13)]


def test_data_is_on_the_cpu_whatever_the_default_device():
    graph = make_graph()
    expected = graph.to_data()
    with torch.device("meta"):
        data = graph.to_data()
    tensors = {name: value for name, value in expected if isinstance(value, torch.Tensor)}
    assert len(tensors) == 7
    assert all(torch.equal(data[name], value) for name, value in tensors.items())


def test_live_nodes_may_count_some_outputs_only():
    # 0→2→4, 1→3→5, and 3→4 is hallucinated.
    graph = NeuralGraph((2, 2, 2), 4, node_function=nn.Identity())
    weight = graph.candidates.flat_index(torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]]))
    graph.candidates.weight.data.mul_(0.01)[weight] = 1.0
    assert graph.live_nodes().all()
    live = graph.live_nodes(torch.tensor([True, False]))
    assert live.tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize("k", [0, -3])
def test_numbers_of_edges_below_one_are_refused(k):
    with pytest.raises(InputError, match=f"stage2: num_edges must be an integer >= 1; got {k}"):
        NeuralGraph((3, 4), k, name="stage2")


@pytest.mark.parametrize("stride", [0, -1, 2.0, True, "2"])
@pytest.mark.parametrize("options", [{"blocks": (3, 4)}, {"num_nodes": 7, "num_inputs": 3, "num_outputs": 4}])
def test_strides_that_are_no_integers_from_one_up_are_refused(stride, options, unchecked):
    dynamics = "static" if "blocks" in options else Discrete(2)
    with pytest.raises(InputError, match=rf": stride must be an integer( >= 1)?; got {stride!r}"):
        NeuralGraph(**options, stride=stride, dynamics=dynamics, name="stage2")


def test_integers_of_numpy_are_integers(unchecked):
    graph = NeuralGraph((np.int64(3), np.int32(4), 2), np.int64(9), stride=np.int64(2))
    assert (graph.blocks, graph.num_edges, graph.candidates.num_candidates) == ((3, 4, 2), 9, 26)
    assert {type(number) for number in (*graph.blocks, graph.num_edges)} == {int}
    assert graph(torch.randn(2, 3, 4, 4)).shape == (2, 2, 2, 2)
    graph.rewire("random_graph", np.uint8(7))
    assert graph.num_real_edges == 7
    for bad in (np.bool_(True), np.float64(3), np.int64(0)):
        with pytest.raises(InputError, match="num_edges must be an integer"):
            NeuralGraph((3, 4), bad)
        with pytest.raises(InputError, match=r"blocks must be (a sequence of|two or more positive) integers"):
            NeuralGraph((3, bad), 2)


@pytest.mark.parametrize("k", [2.0, 2.5, "3", True])
def test_numbers_of_edges_that_are_no_integers_are_refused(k, unchecked):
    with pytest.raises(InputError, match="num_edges must be an integer or None; got"):
        NeuralGraph((3, 4), k)


def test_more_edges_than_candidates_are_refused():
    NeuralGraph((30, 40), 1_200)
    with pytest.raises(InputError, match=r"1,201 is more than the 1,200 candidate edges"):
        NeuralGraph((30, 40), 1_201)


@pytest.mark.parametrize("blocks", [(), (3,), (3, 0), (3, -1, 2)])
def test_blocks_that_are_no_graph_are_refused(blocks):
    with pytest.raises(InputError, match="blocks must be two or more positive integers"):
        NeuralGraph(blocks, 1)


@pytest.mark.parametrize("shape", [(3,), (), (2, 4, 5, 5), (2, 5, 5, 3), (3, 5, 5), (2, 3, 5), (2, 3, 5, 5, 5)])
def test_inputs_of_another_shape_are_refused(shape, unchecked):
    with pytest.raises(
        InputError,
        match=r"graph: the input must be a tensor of float32 \[batch, 3, height, width\] on cpu, .* got a tensor",
    ):
        NeuralGraph((3, 4), 2)(torch.zeros(shape))


@pytest.mark.parametrize("batch", [2, 20])
@pytest.mark.parametrize(("graph_type", "type_of_x"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_autocast_does_not_mix_double_with_single_precision(graph_type, type_of_x, batch):
    graph = NeuralGraph(SIZES, K).to(graph_type)
    expected = f"^graph: the input must be a tensor of {str(graph_type).removeprefix('torch.')} "
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match=expected):
        graph(torch.randn(batch, 3, 5, 5, dtype=type_of_x))


def test_given_candidates_are_used():
    candidates = CandidateEdges.adjacent(SIZES)
    graph = NeuralGraph(SIZES, K, candidates=candidates)
    assert graph.candidates.blocks == candidates.blocks
    assert torch.equal(graph.candidates.weight, candidates.weight)
    with pytest.raises(InputError, match="more than the 36 candidate"):
        NeuralGraph(SIZES, 37, candidates=candidates)


@pytest.mark.parametrize("dynamics", ["static", "discrete"])
def test_graphs_of_the_same_candidates_have_weights_of_their_own(dynamics):
    options = {"blocks": SIZES, "candidates": CandidateEdges.static(SIZES)}
    if dynamics == "discrete":
        options = {"num_nodes": 7, "num_inputs": 3, "num_outputs": 2, "dynamics": Discrete(2)}
        options["candidates"] = CandidateEdges.dynamic(7)
    first, second = (NeuralGraph(num_edges=K, **options) for _ in range(2))
    before = second.candidates.weight.detach().clone()
    with torch.no_grad():
        first.candidates.weight.zero_()
    assert torch.equal(second.candidates.weight, before)
    assert torch.equal(options["candidates"].weight, before)


@pytest.mark.parametrize("wiring", ["dnw", "random_graph", "complete"])
@pytest.mark.parametrize("training", [True, False])
def test_what_reads_give_may_be_changed(wiring, training):
    graph = make_graph(wiring=wiring, node_function=nn.Tanh()).train(training)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected, state = graph(x), {key: value.clone() for key, value in graph.state_dict().items()}
    for tensor in (graph.real_index, graph.edge_index, graph.edge_weight):
        tensor.zero_()
    assert torch.equal(graph(x), expected)
    assert all(torch.equal(value, state[key]) for key, value in graph.state_dict().items())


@pytest.mark.parametrize("wiring", [None, "dnw", "random_graph"])
def test_a_graph_comes_back_from_its_data(wiring):
    graph = NeuralGraph(blocks=(3, 6, 4), num_edges=15, name="first").eval()
    options = {} if wiring is None else {"wiring": wiring}
    data = graph.to_data()
    again = NeuralGraph.from_data(data, **options).eval()
    assert again.blocks == (3, 6, 4)
    assert torch.equal(again.edge_index, graph.edge_index)
    assert torch.equal(again.edge_weight, graph.edge_weight)
    data.edge_index, data.edge_weight = data.edge_index.flip(1), data.edge_weight.flip(0)  # in any order
    assert torch.equal(NeuralGraph.from_data(data, **options).edge_weight, graph.edge_weight)


@pytest.mark.parametrize("wiring", ["set", "rigl", "sparse_momentum", RandomGraph(separate_scores=True)])
def test_rules_that_draw_their_edges_start_from_given_ones(wiring):
    graph = NeuralGraph(blocks=(3, 6, 4), num_edges=15).eval()
    again = NeuralGraph.from_data(graph.to_data(), wiring=wiring).eval()
    assert torch.equal(again.edge_index, graph.edge_index)
    assert torch.equal(again.edge_weight, graph.edge_weight)
    data = graph.to_data()
    del data.edge_weight
    with pytest.raises(InputError, match="another rule starts from the weights of the edges: give edge_weight"):
        NeuralGraph.from_data(data, wiring=wiring)


def test_a_dynamic_graph_comes_back_from_its_data():
    graph = NeuralGraph(num_nodes=10, num_inputs=3, num_outputs=2, num_edges=15, dynamics=Discrete(steps=2))
    again = NeuralGraph.from_data(graph.to_data(), dynamics=Discrete(steps=2))
    again.load_state_dict(
        {**graph.state_dict(), **{k: v for k, v in again.state_dict().items() if "wiring" in k or "rule" in k}}
    )
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(again.eval()(x), graph.eval()(x))


def test_a_graph_from_data_of_other_origin():
    from torch_geometric.data import Data

    edge_index = torch.tensor([[0, 1, 0], [2, 3, 4]])
    graph = NeuralGraph.from_data(Data(edge_index=edge_index, num_nodes=5), blocks=(2, 3))
    assert graph.edge_index.T.tolist() == [[0, 2], [1, 3], [0, 4]]
    with pytest.raises(InputError, match=r"has no ascending block for every node: give blocks="):
        NeuralGraph.from_data(Data(edge_index=edge_index, num_nodes=5))
    with pytest.raises(InputError, match=r"the first nodes as inputs and the last as outputs: give num_inputs"):
        NeuralGraph.from_data(Data(edge_index=edge_index, num_nodes=5), dynamics=Discrete(steps=2))
    with pytest.raises(InputError, match=r"\(2, 3\) is not a candidate edge"):
        NeuralGraph.from_data(Data(edge_index=torch.tensor([[2], [3]]), num_nodes=5), blocks=(2, 3))
    with pytest.raises(InputError, match=r"must be a torch_geometric.data.Data with"):
        NeuralGraph.from_data(edge_index)


def test_heterogeneous_data_has_the_edges_of_each_pair_of_blocks():
    graph = NeuralGraph(blocks=(3, 6, 4), num_edges=30)
    data = graph.to_hetero_data()
    assert data.validate()
    assert {name: data[name].num_nodes for name in data.node_types} == {"block0": 3, "block1": 6, "block2": 4}
    start = {"block0": 0, "block1": 3, "block2": 9}
    found = {}
    for source, relation, target in data.edge_types:
        assert relation == "to"
        store = data[source, relation, target]
        for (u, v), weight in zip(store.edge_index.T.tolist(), store.edge_weight.tolist(), strict=True):
            found[u + start[source], v + start[target]] = weight
    assert found == dict(zip(map(tuple, graph.edge_index.T.tolist()), graph.edge_weight.tolist(), strict=True))
    assert data["block0"].input_mask.all()
    assert data["block2"].output_mask.all()


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": (3, 6, 4)},
        {"num_nodes": 13, "num_inputs": 3, "num_outputs": 4, "dynamics": Discrete(steps=2)},
    ],
    ids=["static", "discrete"],
)
def test_a_graph_comes_back_from_heterogeneous_data(options):
    graph = NeuralGraph(**options, num_edges=30)
    again = NeuralGraph.from_data(graph.to_hetero_data(), dynamics=options.get("dynamics", "static"))
    assert again.blocks == graph.blocks == (3, 6, 4)
    assert torch.equal(again.edge_index, graph.edge_index)
    assert torch.equal(again.edge_weight, graph.edge_weight)


def test_a_graph_from_heterogeneous_data_of_other_origin():
    from torch_geometric.data import HeteroData

    data = HeteroData()
    data["author"].x, data["paper"].num_nodes, data["venue"].num_nodes = torch.zeros(2, 7), 3, 2
    data["paper", "in", "venue"].edge_index = torch.tensor([[2, 0], [1, 0]])
    data["author", "writes", "paper"].edge_index = torch.tensor([[1], [2]])
    graph = NeuralGraph.from_data(data)
    assert graph.blocks == (2, 3, 2)
    assert graph.edge_index.T.tolist() == [[1, 4], [2, 5], [4, 6]]
    data["paper", "in", "venue"].edge_weight = torch.tensor([0.5, 2.0])
    with pytest.raises(InputError, match=r"type \('author', 'writes', 'paper'\) have no edge_weight, but others do"):
        NeuralGraph.from_data(data)
    data["author", "writes", "paper"].edge_weight = torch.tensor([-1.0])
    assert NeuralGraph.from_data(data).edge_weight.tolist() == [-1.0, 2.0, 0.5]


@pytest.mark.parametrize(
    "make", [lambda: NeuralGraph((3, 4, 2), 8, wiring="l1_anneal"), lambda: TinyClassifier("static")]
)
def test_copies_on_several_devices_are_refused(make):
    """nn.DataParallel makes copies with ``_replicate_for_data_parallel``, on a CPU as well."""
    with pytest.raises(InputError, match=r"copies a .* use nn\.parallel\.DistributedDataParallel"):
        make()._replicate_for_data_parallel()(torch.randn(2, 3, 8, 8))
