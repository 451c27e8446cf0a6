import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from dynamic_reference import Changed
from reference import Algorithm1, batch_norm, convolve, instance_norm, static_pairs
from torch import nn

from dnw_graph import CandidateEdges, InputError, NeuralGraph
from dnw_graph.models import STAGES, edges_at_width
from dnw_graph.node_functions import NormReluConv

SIZES = (3, 5, 4, 2)
K = 18
NORMS = {"batch": batch_norm, "instance": instance_norm}


def plain_twin(graph, norm, stride, **sgd):
    """Algorithm 1 with the weights and parameters of a graph, node by node."""
    theta, strides = {}, {}
    for function, nodes in graph.dynamics.functions():
        for place, v in enumerate(nodes):
            if not isinstance(function, nn.Identity):
                tensors = function.norm.weight, function.norm.bias, function.conv.weight[:, 0]
                theta[v] = [tensor[place].detach().clone() for tensor in tensors]
                strides[v] = stride if v < SIZES[0] else 1

    def node_function(parameters, v, received):
        if parameters is None:
            return received
        gamma, beta, kernel = parameters
        return convolve(NORMS[norm](received, gamma, beta).relu(), kernel, strides[v])

    weights = dict(zip(static_pairs(SIZES), graph.candidates.weight.tolist(), strict=True))
    return Algorithm1(SIZES, K, weights, theta, node_function, **sgd)


@pytest.mark.parametrize(
    ("norm", "stride", "ends"),
    [("batch", 1, (True, False)), ("instance", 2, (True, False)), ("batch", 1, (False, True))],
    ids=["batch norm", "instance norm, stride 2", "equation 1 as it reads"],
)
@pytest.mark.parametrize("sgd", [{"momentum": 0.0, "weight_decay": 0.0}, {"momentum": 0.9, "weight_decay": 1e-2}])
def test_training_follows_algorithm_1_line_by_line(digits, norm, stride, ends, sgd):
    images, labels = digits
    graph = NeuralGraph(
        SIZES,
        K,
        node_function=lambda num_nodes, stride=1: NormReluConv(num_nodes, stride, norm=norm),
        stride=stride,
        input_function=ends[0],
        output_function=ends[1],
    ).double()
    optimiser = torch.optim.SGD(graph.parameters(), lr=1.0, **sgd)
    plain = plain_twin(graph, norm, stride, lr=1.0, **sgd)
    wirings = set()
    for step in range(6):
        x = images[12 * step : 12 * (step + 1)].view(4, 3, 8, 8)
        target = labels[12 * step : 12 * step + 4] % 2

        def loss_of_outputs(out, target=target):
            return F.cross_entropy(out.mean(dim=(2, 3)), target)

        assert [tuple(pair) for pair in graph.edge_index.T.tolist()] == plain.choose_edges()
        optimiser.zero_grad()
        loss = loss_of_outputs(graph(x))
        loss.backward()
        optimiser.step()
        edges, plain_loss = plain.iterate(x, loss_of_outputs)

        assert abs(loss.item() - plain_loss) < 1e-10
        weights = torch.tensor(list(plain.weights.values()), dtype=torch.float64)
        torch.testing.assert_close(graph.candidates.weight.detach(), weights, rtol=0, atol=1e-10)
        torch.testing.assert_close(plain_twin(graph, norm, stride, lr=0, **sgd).theta, plain.theta, rtol=0, atol=1e-10)
        wirings.add(tuple(edges))
    assert len(wirings) > 1  # edges were swapped: the comparison covers it


def groups_of(blocks):
    return torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks))


@pytest.mark.parametrize("blocks", STAGES, ids=["stage 1", "stage 2", "stage 3", "stage 4", "stage 5"])
def test_longest_path_of_a_stage_is_its_number_of_blocks_less_one(blocks):
    graph = NeuralGraph(blocks, edges_at_width(blocks, 0.225))
    # Every candidate leads to a later block, so no path has more edges than that ...
    source, target = graph.candidates.pairs(torch.arange(graph.num_candidates))
    block = groups_of(blocks)
    assert (block[source] < block[target]).all()
    # ... and the candidates among three nodes of each block hold a path that has as many.
    few = torch.cat([torch.nonzero(block == b).flatten()[:3] for b in range(len(blocks))])
    candidates = nx.DiGraph((int(u), int(v)) for u in few for v in few if block[u] < block[v])
    assert (graph.candidates.flat_index(torch.tensor(list(candidates.edges)).T) >= 0).all()
    assert nx.dag_longest_path_length(candidates) == len(blocks) - 1
    chosen = nx.DiGraph(graph.edge_index.T.tolist())
    assert nx.dag_longest_path_length(chosen) <= len(blocks) - 1


@pytest.mark.parametrize("blocks", [(2, 3), (4, 1, 3), (2, 2, 2, 2, 2)])
def test_longest_path_of_a_complete_graph(blocks):
    graph = NeuralGraph(blocks, CandidateEdges.static(blocks).num_candidates, wiring="dnw")
    assert nx.dag_longest_path_length(nx.DiGraph(graph.edge_index.T.tolist())) == len(blocks) - 1


@pytest.mark.parametrize(
    "blocks_of_candidates",
    [
        [(range(2), range(2, 5))],  # one block of candidates is missing
        [(range(2), range(2, 5)), (range(5), range(5, 8))],  # one node too few
        [(range(2), range(2, 5)), (range(1, 5), range(5, 9))],  # a part of a block feeds
        [(range(2), range(2, 5)), (range(5, 9), range(2, 5))],  # leads backwards
        [(range(5), range(5, 9)), (range(2), range(2, 5))],  # out of order
    ],
)
def test_candidates_that_do_not_fit_the_blocks_are_refused(blocks_of_candidates):
    with pytest.raises(InputError, match="candidates"):
        NeuralGraph((2, 3, 4), 3, candidates=CandidateEdges(blocks_of_candidates))


def test_a_stride_without_a_function_at_the_inputs_is_refused():
    with pytest.raises(InputError, match="input_function=True"):
        NeuralGraph((2, 3), 3, stride=2, input_function=False)


def test_skipping_candidates_may_be_left_out():
    layered = NeuralGraph((2, 3, 4), 18, candidates=CandidateEdges.adjacent((2, 3, 4)))
    assert layered.num_candidates == 18
    assert (groups_of((2, 3, 4))[layered.edge_index].diff(dim=0) == 1).all()
    assert layered(torch.randn(2, 2, 5, 5)).shape == (2, 4, 5, 5)


WRONG = {
    "twice the nodes": lambda z: torch.cat([z, z], 1),
    "fewer nodes": lambda z: z[:, 1:],
    "fewer images": lambda z: z[:9],
    "smaller maps": lambda z: z[..., ::2, ::2],
    "vectors": lambda z: z.mean((2, 3)),
    "no batch": lambda z: z[0],
}


@pytest.mark.parametrize("propagation", ["auto", "block", "message_passing"])
@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize(("block", "kinds"), [(0, list(WRONG)[:3]), (1, list(WRONG)), (3, list(WRONG)[:3])])
def test_states_of_another_shape_are_refused(propagation, layered, block, kinds):
    candidates = CandidateEdges.adjacent(SIZES) if layered else None
    for kind in kinds:
        graph = NeuralGraph(SIZES, 9, propagation=propagation, candidates=candidates, name="stage3")
        graph.dynamics.node_functions[block] = Changed(WRONG[kind])
        shape = f"20, {SIZES[block]}, " + ("6, 5" if block == 1 else "…")
        with pytest.raises(InputError, match=rf"^stage3: .*block {block} gave .*; expected \[{shape}\], since all"):
            graph(torch.randn(20, 3, 6, 5))


@pytest.mark.parametrize("propagation", ["auto", "block", "message_passing"])
def test_inputs_and_outputs_may_change_the_maps(propagation):
    graph = NeuralGraph(SIZES, K, propagation=propagation, node_function=nn.Tanh(), output_function=True)
    graph.dynamics.node_functions[0] = nn.MaxPool2d(2)
    graph.dynamics.node_functions[-1] = nn.Flatten(2)
    assert graph(torch.randn(20, 3, 6, 4)).shape == (20, 2, 6)
