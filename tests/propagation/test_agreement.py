"""All propagations give one result: that of a plain loop, and each other's, per tensor by ‖a − b‖ / ‖b‖."""

from functools import partial
from itertools import combinations

import pytest
import torch
from pairs import rest_is_slow
from reference import candidate_gradient, plain_forward, relative_error, static_pairs
from torch import nn
from torch.func import functional_call

from dnw_graph import Discrete, InputError, NeuralGraph, Wiring
from dnw_graph.propagation import MessagePassingPropagation, propagate

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
WAYS = [
    "block",
    "message_passing",
    "csr",
    "sparse",
    "auto",
    pytest.param("torch_sparse", marks=pytest.mark.ext),
]
SIZES = (3, 4, 2)
PAIRS = static_pairs(SIZES)
EDGES = {
    "some": [0, 3, 4, 9, 12, 15, 18, 25],
    "all": list(range(26)),
    "one": [17],
    "none in the first block": [12, 14, 20, 25],
    "none in the last block": [0, 5, 7],
    "none at all": [],
}


class Fixed(Wiring):
    """Given edges; all candidates get a gradient, the real ones only, or these and every third one."""

    needs_steps = False

    def __init__(self, index, learning="all"):
        super().__init__()
        self.trained = learning
        self.index = torch.tensor(index, dtype=torch.long)

    def choose(self, view):
        return self.index

    def trained_edges(self, view):
        return torch.tensor(sorted({*self.index.tolist(), *range(0, view.num_candidates, 3)}))


def propagation(way):
    if way == "torch_sparse":
        pytest.importorskip("torch_sparse")
    return MessagePassingPropagation(way) if way in ("csr", "torch_sparse") else way


def weigh(out):
    """A loss that weighs every output value differently."""
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()


def tensors_of(graph, x):
    """The output, and the gradient of the input and of every parameter."""
    x = x.clone().requires_grad_()
    out = graph(x)
    weigh(out).backward()
    parameters = {name: p.grad for name, p in graph.named_parameters()}
    return {"output": out, "input": x.grad, **parameters}


def assert_agree(tensors, reference):
    assert tensors.keys() == reference.keys()
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), name
        assert relative_error(tensor, reference[name]) <= TOLERANCE[tensor.dtype], name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize(
    ("learning", "sampled"), [("all", 0), ("real", 1), *rest_is_slow([("own", 1), ("own", 0), ("real", 0)])]
)
def test_equals_a_plain_loop(way, dtype, edges, learning, sampled, monkeypatch):
    """Whether gradients of some candidates are computed edge by edge, or those of all in one product."""
    monkeypatch.setattr(propagate, "SAMPLED", sampled)
    index = EDGES[edges]
    learn = {"all": PAIRS, "real": index, "own": {*index, *range(0, len(PAIRS), 3)}}[learning]
    graph = NeuralGraph(
        SIZES,
        max(1, len(index)),
        wiring=Fixed(index, learning),
        node_function=nn.Identity(),
        propagation=propagation(way),
    ).to(dtype)
    weights = graph.candidates.weight.tolist()
    for space in ((), (7,), (5, 4)):  # vectors, sequences, maps
        x = torch.randn(2, SIZES[0], *space, dtype=dtype)
        graph.zero_grad()
        loop_x = x.double().clone().requires_grad_()
        states, offsets = plain_forward(loop_x, SIZES, {PAIRS[i]: weights[i] for i in index}, lambda _, z: z)
        out = torch.stack(states[-SIZES[-1] :], dim=1)
        weigh(out).backward()
        gradient = [
            candidate_gradient(states, offsets, u, v) if learning == "all" or i in learn else 0.0
            for i, (u, v) in enumerate(PAIRS)
        ]
        loop = {
            "output": out,
            "input": torch.zeros_like(x) if loop_x.grad is None else loop_x.grad,
            "candidates.weight": torch.tensor(gradient, dtype=torch.float64),
        }
        assert_agree(tensors_of(graph, x), loop)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("wiring", ["dnw", "random_graph"])
@pytest.mark.parametrize("k", [1, 40, 900, 1_760])
def test_agree_on_graphs_with_node_functions(dtype, wiring, k, digits):
    x = digits[0][: 4 * 16].view(4, 16, 8, 8).to(dtype)
    results = {}
    for way in ("block", "message_passing", "csr", "auto"):
        torch.manual_seed(3)
        graph = NeuralGraph((16, 32, 26), k, wiring=wiring, propagation=propagation(way)).to(dtype)
        results[way] = tensors_of(graph, x)
    for way, other in combinations(results, 2):
        assert_agree(results[way], results[other])


@pytest.mark.ext
@pytest.mark.parametrize("k", [1, 40, 900])
def test_torch_sparse_agrees_on_graphs_with_node_functions(k, digits):
    pytest.importorskip("torch_sparse")
    x = digits[0][: 4 * 16].view(4, 16, 8, 8)
    results = []
    for way in ("torch_sparse", "block"):
        torch.manual_seed(3)
        graph = NeuralGraph((16, 32, 26), k, propagation=propagation(way)).double()
        results.append(tensors_of(graph, x))
    assert_agree(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("share", [0.02, 0.06, 0.07])
def test_agree_on_large_sparse_blocks(dtype, share):
    x = torch.randn(2, 720, 5, 5, dtype=dtype)
    results = {}
    for way in ("block", "message_passing", "csr", "auto"):
        torch.manual_seed(3)
        graph = NeuralGraph((720, 730), int(share * 720 * 730), propagation=propagation(way)).to(dtype)
        results[way] = tensors_of(graph, x)
    for way, other in combinations(results, 2):
        assert_agree(results[way], results[other])


@pytest.mark.parametrize("way", WAYS)
def test_inputs_in_either_memory_format_give_one_result(way):
    x = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(3)
        graph = NeuralGraph(SIZES, 9, propagation=propagation(way)).double()
        results.append(tensors_of(graph, x.contiguous(memory_format=memory_format)))
    assert_agree(*results)
    strided = torch.randn(3, 6, 12, 5, dtype=torch.float64)[:, ::2, ::2]
    with torch.no_grad():
        assert relative_error(graph(strided), graph(strided.contiguous())) <= 1e-10


class Convolution(nn.Sequential):
    """A node function that starts by changing what it receives, in place or not."""

    def __init__(self, num_nodes, inplace):
        super().__init__(nn.ReLU(inplace), nn.Conv2d(num_nodes, num_nodes, 3, padding=1, groups=num_nodes))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", ["fused", "own"])
@pytest.mark.parametrize("options", [{}, {"output_function": True}, {"dynamics": Discrete(3)}])
def test_what_a_graph_gives_may_be_changed_in_place(way, function, options):
    nodes = {"num_nodes": 9, "num_inputs": 3, "num_outputs": 2} if "dynamics" in options else {"blocks": SIZES}
    x = torch.randn(20, 3, 6, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    results = []
    for inplace in (False, True):
        torch.manual_seed(3)
        own = partial(Convolution, inplace=inplace)
        node_function = "norm_relu_conv" if function == "fused" else own
        graph = NeuralGraph(num_edges=9, node_function=node_function, propagation=propagation(way), **options, **nodes)
        # Not the leaf itself, which nobody may change.
        model = nn.Sequential(nn.Conv2d(3, 3, 1), graph, nn.ReLU(inplace)).double()
        results.append(tensors_of(model, x))
    assert_agree(*results)
    out = graph(x.clone())
    expected = out + x[:, :2]
    out += x[:, :2]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("way", WAYS)
def test_no_gradient_is_asked_of_frozen_weights_or_inputs(way):
    graph = NeuralGraph(SIZES, 9, propagation=propagation(way))
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    graph.requires_grad_(False)
    graph(x).sum().backward()
    assert graph.candidates.weight.grad is None
    assert x.grad is not None
    graph.requires_grad_(True)
    graph(x.detach()).sum().backward()
    assert graph.candidates.weight.grad is not None


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_batch_passes(way):
    graph = NeuralGraph(SIZES, 9, node_function=nn.Tanh(), propagation=propagation(way))
    out = graph(torch.zeros(0, 3, 5, 4))
    out.sum().backward()
    assert out.shape == (0, 2, 5, 4)
    assert (graph.candidates.weight.grad == 0).all()


def test_second_derivatives_of_the_block_path_are_numerically_right():
    graph = NeuralGraph(SIZES, 9, node_function=nn.Tanh(), propagation="block").double()
    real, weight = graph.real_index, graph.candidates.weight.detach()

    def run(x, real_weight):
        return functional_call(graph, {"candidates.weight": weight.index_copy(0, real, real_weight)}, (x,))

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(run, (x, weight[real].requires_grad_()))


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("block", "auto")])
def test_second_derivatives_of_other_ways_are_refused(way):
    graph = NeuralGraph(SIZES, 9, node_function=nn.Tanh(), propagation=propagation(way))
    x = torch.randn(2, 3, requires_grad=True)
    # Of a constant gradient, too: PyTorch itself would take the second derivative for zero there.
    for loss in (graph(x).square().sum(), graph(x).sum()):
        with pytest.raises(InputError, match="propagation='block'"):
            torch.autograd.grad(loss, x, create_graph=True)
