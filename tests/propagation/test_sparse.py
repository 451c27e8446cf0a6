"""Sparse propagation: what its chain of products must do beside giving the right numbers."""

import gc
import weakref

import pytest
import torch
from pairs import rest_is_slow
from reference import relative_error
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dnw_graph import DNW, CandidateEdges, Discrete, InputError, NeuralGraph, RandomGraph, TopKAST
from dnw_graph.propagation import AutoPropagation, MessagePassingPropagation, SparsePropagation, propagate, sparse
from dnw_graph.propagation.sparse import _few_pixels as few_pixels

SIZES = (3, 4, 5, 2)


class Cut(nn.Module):
    """Hands states on without their gradient."""

    def forward(self, z):
        return z.detach() * 2


def cut_in_the_middle():
    """Node functions of which only that of the block of 5 nodes cuts the gradient."""
    return lambda num_nodes, stride=1: Cut() if num_nodes == 5 else nn.Tanh()


def gradients(graph, x, times=1):
    """Gradients of inputs and of all parameters, from a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    out = graph(x)
    loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    named = [("input", x), *((name, p) for name, p in graph.named_parameters() if p.requires_grad)]
    for turn in range(times):
        found = torch.autograd.grad(
            loss, [p for _, p in named], retain_graph=turn < times - 1, allow_unused=True, materialize_grads=True
        )
    return {name: grad for (name, _), grad in zip(named, found, strict=True)}


@pytest.fixture(autouse=True)
def some(monkeypatch):
    """Gradients of some candidates are computed edge by edge, however many they are."""
    monkeypatch.setattr(propagate, "SAMPLED", 1.0)


def pair(**options):
    """The same graph by sparse and by dense products."""
    graphs = []
    for propagation in ("sparse", "block"):
        torch.manual_seed(0)
        graphs.append(NeuralGraph(SIZES, 20, propagation=propagation, **options).double())
    return graphs


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        # Some are all but zero: the gradient of a scale that a norm behind it undoes.
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


X = torch.randn(6, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_default_device_does_not_matter():
    graphs = pair()
    with torch.device("meta"):
        found = [torch.autograd.grad(graph(X).square().sum(), list(graph.parameters())) for graph in graphs]
    assert_same(*(dict(enumerate(grads)) for grads in found))


@pytest.mark.parametrize("factor", [1.0, 0.0])
@pytest.mark.parametrize(("rows", "few"), [(slice(1, 3), True), (slice(1, 4), False)])
def test_a_loss_of_a_patch(rows, few, factor, monkeypatch):
    seen = []
    monkeypatch.setattr(sparse, "_few_pixels", lambda *args: (seen.append(found := few_pixels(*args)), found)[1])
    found = []
    for graph in pair(node_function=nn.Tanh()):
        (factor * graph(X)[:, :, rows].square().sum()).backward()
        found.append({name: p.grad for name, p in graph.named_parameters()})
    assert_same(*found)
    assert (seen[0] is not None) is (few or not factor)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"wiring": RandomGraph()},
        {"wiring": RandomGraph(), "node_function": nn.Tanh()},
        {"wiring": TopKAST(extra=15, strength=0.0)},
        {"node_function": "norm_relu_conv_norm_relu", "output_function": True, "stride": 2},
        {"input_function": False},
        {"node_function": cut_in_the_middle()},
        {"candidates": CandidateEdges.adjacent(SIZES)},
        {"candidates": CandidateEdges([(range(3), range(3, 7)), (range(3), range(7, 12)), (range(12), range(12, 14))])},
    ],
    ids=[
        "plain",
        "random",
        "random, tanh",
        "some",
        "two norms",
        "bare inputs",
        "a cut gradient",
        "layers",
        "a block left out",
    ],
)
def test_gradients_are_those_of_dense_products(options):
    sparse, block = pair(**options)
    assert_same(gradients(sparse, X), gradients(block, X))


def test_vectors_have_no_space():
    sparse, block = pair(node_function=nn.Tanh())
    assert_same(gradients(sparse, X[:, :, 0, 0]), gradients(block, X[:, :, 0, 0]))


def test_a_kept_graph_gives_the_same_gradients_again():
    sparse, block = pair()
    assert_same(gradients(sparse, X, times=3), gradients(block, X))


def test_two_forward_passes_keep_their_states_apart():
    sparse, _ = pair()
    expected = [gradients(sparse, x) for x in (X, 2 * X)]
    inputs = [X.clone().requires_grad_(), (2 * X).requires_grad_()]
    outs = [sparse(x) for x in inputs]
    for out in outs:
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    for x, one in zip(inputs, expected, strict=True):
        assert relative_error(x.grad, one["input"]) < 1e-12
    total = sum(one["candidates.weight"] for one in expected)
    assert relative_error(sparse.candidates.weight.grad, total) < 1e-12


def test_a_graph_whose_forward_pass_is_done_again_in_the_backward_pass():
    sparse, block = pair()

    def again(x):
        return checkpoint(sparse, x, use_reentrant=False)

    again.named_parameters = sparse.named_parameters
    assert_same(gradients(again, X), gradients(block, X))


@pytest.mark.parametrize("block", range(len(SIZES) - 1))
@pytest.mark.parametrize("wiring", ["dnw", "random_graph"])
def test_a_loss_may_be_made_of_states_within(block, wiring):
    found = []
    for graph in pair(wiring=wiring):
        seen, x = [], X.clone().requires_grad_()
        graph.dynamics.node_functions[block].register_forward_hook(lambda *args, seen=seen: seen.append(args[2]))
        graph(x)
        (seen[0] * torch.linspace(-1, 2, seen[0].numel(), dtype=X.dtype).view(seen[0].shape)).sum().backward()
        found.append({"input": x.grad, "weight": graph.candidates.weight.grad})
    if block == 0:  # Nothing has passed an edge yet.
        assert [each.pop("weight") for each in found] == [None, None]
    assert_same(*found)
    assert found[0]["input"].any()


def test_a_backward_pass_may_go_a_part_of_the_way():
    sparse, _ = pair()
    x = X.clone().requires_grad_()
    loss = sparse(x).sin().sum()
    leaves = [x, *sparse.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    last_function = sparse.dynamics.node_functions[2]
    torch.autograd.grad(2 * loss, last_function.conv.weight, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, second))


def test_part_of_the_outputs_is_enough():
    sparse, block = pair(node_function=nn.Tanh())
    found = []
    for graph in (sparse, block):
        graph(X)[:, 1, :2].square().sum().backward()
        found.append(graph.candidates.weight.grad)
    assert relative_error(*found) < 1e-10


def watch(graph):
    """Weak references to the states that the node functions return."""
    seen = []
    for function in graph.dynamics.node_functions:
        function.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    return seen


@pytest.mark.parametrize("backward", [True, False])
def test_states_live_no_longer_than_the_backward_pass_needs_them(backward):
    sparse, _ = pair()
    seen = watch(sparse)
    gc.collect()
    gc.disable()
    try:
        loss = sparse(X).sum()
        if backward:
            loss.backward()  # The loss is still there.
        else:
            del loss
        assert len(seen) == len(SIZES)
        assert not any(reference() is not None for reference in seen[:-1])
    finally:
        gc.enable()


def test_states_are_kept_once():
    sparse, _ = pair(node_function=nn.Tanh())
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        sparse(X)
    tanh = len(SIZES) - 1  # keeps its results, which are the states; the inputs' copy and the weights are kept besides
    assert len(set(kept)) <= tanh + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_refused(dtype):
    graph = NeuralGraph(SIZES, 20, propagation="sparse").to(dtype)
    with pytest.raises(InputError, match=f"weights in float32 or float64 on a CPU; got {dtype}"):
        graph(torch.zeros(2, 3, 4, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_graph_computes_in_single_precision(dtype):
    graph = NeuralGraph(SIZES, 20, propagation="sparse")
    x = X.to(dtype)
    expected = gradients(graph, x.float())
    with torch.autocast("cpu", dtype=dtype):
        results = gradients(graph, x)
        layer = nn.Linear(4, 2)(torch.ones(1, 4))
    assert layer.dtype == dtype  # autocast is as before
    assert results.pop("input").dtype == dtype
    del expected["input"]
    assert results.keys() == expected.keys()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_doubles_stay_doubles_under_autocast():
    sparse, block = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(gradients(sparse, X), gradients(block, X))


def test_without_kernels_it_gives_the_same(monkeypatch):
    sparse, block = pair()
    monkeypatch.setenv("DNW_GRAPH_KERNELS", "0")
    assert_same(gradients(sparse, X), gradients(block, X))
    random, block = pair(wiring=RandomGraph())
    assert_same(gradients(random, X), gradients(block, X))


def test_it_can_be_given_as_an_object():
    graph = NeuralGraph(SIZES, 20, propagation=SparsePropagation())
    assert graph(X.float()).shape == (6, 2, 5, 4)


@pytest.mark.parametrize("dynamics", ["static", "discrete"])
def test_a_candidate_gradient_in_bfloat16_changes_nothing_else(dynamics):
    found = []
    for propagation in (SparsePropagation(), AutoPropagation(candidate_gradient="bfloat16")):
        torch.manual_seed(0)
        static = {"blocks": SIZES} if dynamics == "static" else {}
        nodes = static or {"num_nodes": 14, "num_inputs": 3, "num_outputs": 2, "dynamics": Discrete(steps=1)}
        graph = NeuralGraph(**nodes, num_edges=20 if static else 60, propagation=propagation)
        found.append(gradients(graph, torch.cat([X, X, X]).float()))
    exact, rounded = (each.pop("candidates.weight") for each in found)
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
    assert 1e-5 < relative_error(rounded, exact) < 2**-7
    assert torch.equal(rounded, rounded.bfloat16().float())


def test_a_candidate_gradient_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="unknown candidate_gradient 'bfloat': did you mean 'bfloat16'"):
        AutoPropagation(candidate_gradient="bfloat")
    propagation = SparsePropagation(candidate_gradient="bfloat16")
    assert repr(propagation) == "SparsePropagation(candidate_gradient='bfloat16')"
    with pytest.raises(InputError, match=r"candidate_gradient='bfloat16' takes a graph in float32; got torch.float64"):
        NeuralGraph(SIZES, 20, propagation=propagation).double()(X)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_is_refused():
    graph = NeuralGraph(SIZES, 20, propagation="sparse").eval()
    with pytest.raises(InputError, match="cannot be traced or transformed; use propagation='auto'"):
        torch.jit.trace(graph, X.float())


@pytest.mark.parametrize("node_function", rest_is_slow([nn.Tanh(), "norm_relu_conv"]))
def test_gradients_against_differences(node_function):
    torch.manual_seed(0)
    graph = NeuralGraph(SIZES, 20, node_function=node_function, propagation="sparse").double()
    real, weight = graph.real_index, graph.candidates.weight.detach()

    def run(x, real_weight):
        return functional_call(graph, {"candidates.weight": weight.index_copy(0, real, real_weight)}, (x,))

    inputs = (X[:3, :, :3, :2].clone().requires_grad_(), weight[real].clone().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6)


@pytest.mark.parametrize("way", ["sparse", "csr", "edge_index"])
@pytest.mark.parametrize("steps", [None, 2], ids=["static", "discrete"])
def test_gradients_that_nobody_asks_for_are_not_computed(way, steps):
    """Top-KAST asks for some, DNW for all: dense products, which PyTorch's counter sees."""
    shape = {"blocks": SIZES} if steps is None else {"num_nodes": 14, "num_inputs": 3, "num_outputs": 2}
    dynamics = "static" if steps is None else Discrete(steps)
    propagation = SparsePropagation() if way == "sparse" else MessagePassingPropagation(way)
    performed, weight_grads = {}, {}
    for rule in (DNW(), TopKAST(extra=10, strength=0.0)):
        for by in (propagation, "block"):
            torch.manual_seed(0)
            options = {"wiring": rule, "node_function": nn.Tanh(), "dynamics": dynamics, "propagation": by}
            graph = NeuralGraph(num_edges=20, **options, **shape).double()
            loss = graph(X).square().sum()
            with FlopCounterMode(display=False) as counter:
                loss.backward()
            performed[type(rule), by] = counter.get_total_flops()
            weight_grads[type(rule), by] = graph.candidates.weight.grad
        torch.testing.assert_close(*(weight_grads[type(rule), by] for by in (propagation, "block")))
    assert performed[DNW, propagation] > 0
    assert performed[TopKAST, propagation] == 0
