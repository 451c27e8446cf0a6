"""The block path's buffer of states, and the backward pass through it.

What it is compared with: plain loops, finite differences, and the same graph with concatenated states.
"""

import copy
import gc
import weakref

import pytest
import torch
from alone import run_alone
from pairs import every_value
from reference import candidate_gradient, plain_forward, relative_error, static_pairs
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from waits import Waits

from dnw_graph import CandidateEdges, InputError, NeuralGraph, selection
from dnw_graph.models import MobileNetV1DNW
from dnw_graph.propagation import Propagate

SIZES = (3, 4, 2, 5, 3)
K = 60
NODES = [range(3), range(3, 7), range(7, 9), range(9, 14), range(14, 17)]
# Sources that start late, end early, or are one block only.
PARTIAL = [
    (NODES[0], NODES[1]),
    (range(3, 7), NODES[2]),
    (range(7), NODES[3]),
    (range(7, 14), NODES[4]),
]
CANDIDATES = {"all": None, "partial": PARTIAL, "layered": [(NODES[i], NODES[i + 1]) for i in range(4)]}
SPACES = {"vectors": (), "sequences": (7,), "maps": (5, 4)}


class NormTanhConv(nn.Sequential):
    """Like the node function of the paper, but smooth, also where a node receives nothing."""

    def __init__(self, num_nodes):
        conv = nn.Conv2d(num_nodes, num_nodes, 3, padding=1, groups=num_nodes)
        super().__init__(nn.BatchNorm2d(num_nodes, eps=0.1), nn.Tanh(), conv)


def tanh(num_nodes):
    return nn.Tanh()


def identity(num_nodes):
    return nn.Identity()


def make(function=tanh, candidates="all", k=K, **options):
    torch.manual_seed(1)
    given = CANDIDATES[candidates]
    edges = None if given is None else CandidateEdges(given)
    k = min(k, CandidateEdges.static(SIZES).num_candidates if edges is None else edges.num_candidates // 2)
    return NeuralGraph(SIZES, k, node_function=function, candidates=edges, propagation="block", **options).double()


def concatenating(graph):
    """The same graph, with states that are concatenated."""
    graph = copy.deepcopy(graph)
    graph.propagation.register_forward_hook(lambda module, args, propagate: _Concatenating(propagate))
    return graph


class _Concatenating(Propagate):
    def __init__(self, own):
        super().__init__(own.edges, own.weights)
        self.product = own.product


def maps(*space, batch=2):
    torch.manual_seed(2)
    return torch.randn(batch, SIZES[0], *space, dtype=torch.float64, requires_grad=True)


def weigh(out):
    """A loss that weighs every output value differently."""
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()


def gradients(graph, x, loss=weigh):
    graph.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = graph(x)
    loss(out).backward()
    return {"output": out, "input": x.grad} | {name: p.grad for name, p in graph.named_parameters()}


def assert_same(tensors, reference, tolerance=1e-12):
    assert tensors.keys() == reference.keys()
    for name, tensor in tensors.items():
        if reference[name] is None:
            assert tensor is None or not tensor.any(), name
        else:
            assert relative_error(tensor, reference[name]) <= tolerance, name


@pytest.mark.parametrize("space", SPACES)
def test_five_blocks_equal_a_plain_loop(space):
    graph = make()
    weights = graph.candidates.weight.tolist()
    pairs = static_pairs(SIZES)
    x = maps(*SPACES[space])
    loop_x = x.detach().clone().requires_grad_()
    real = {pairs[i]: weights[i] for i in graph.real_index.tolist()}
    is_output = sum(SIZES[:-1])
    states, offsets = plain_forward(loop_x, SIZES, real, lambda v, z: z if v >= is_output else z.tanh())
    out = torch.stack(states[-SIZES[-1] :], dim=1)
    weigh(out).backward()
    gradient = torch.tensor([candidate_gradient(states, offsets, u, v) for u, v in pairs], dtype=torch.float64)
    assert_same(gradients(graph, x), {"output": out, "input": loop_x.grad, "candidates.weight": gradient})


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("wiring", ["dnw", "random_graph", "complete"])
def test_equals_concatenated_states(space, candidates, wiring):
    graph = make(candidates=candidates)
    graph.rewire(wiring, graph.num_edges)
    x = maps(*SPACES[space])
    assert_same(gradients(graph, x), gradients(concatenating(graph), x))


def test_equals_concatenated_states_in_any_memory_format():
    graph = make("norm_relu_conv", stride=2)
    x = maps(6, 5)
    expected = gradients(concatenating(graph), x)
    wide = torch.randn(2, 6, 12, 5, dtype=torch.float64)
    wide[:, ::2, ::2] = x.detach()
    for layout in (x, x.detach().contiguous(memory_format=torch.channels_last), wide[:, ::2, ::2]):
        assert_same(gradients(graph, layout), expected)


@every_value(rest=pytest.mark.slow, candidates=CANDIDATES, function=[tanh, identity, NormTanhConv], order=[1, 2])
def test_gradients_are_numerically_right(candidates, function, order):
    graph = make(function, candidates, k=40)
    real, weight = graph.real_index, graph.candidates.weight.detach()
    functions = {name: p for name, p in graph.named_parameters() if name != "candidates.weight"}

    def run(x, real_weight, *values):
        parameters = dict(zip(functions, values, strict=True))
        parameters["candidates.weight"] = weight.index_copy(0, real, real_weight)
        return functional_call(graph, parameters, (x,))

    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    arguments = (maps(3, 3), weight[real].requires_grad_(), *functions.values())
    assert check(run, arguments, fast_mode=True)


def test_second_derivatives_reach_hallucinated_edges():
    graph = make()
    x = maps(3, 3)
    results = []
    for each in (graph, concatenating(graph)):
        each.zero_grad()
        (gradient,) = torch.autograd.grad(weigh(each(x).square()), x, create_graph=True)
        gradient.square().sum().backward()
        results.append({"weight": each.candidates.weight.grad})
    assert_same(*results)


class Kept:
    """A tensor that is kept for the backward pass; knows when nobody needs it any more."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept(graph, x):
    """The output, what is kept for the backward pass, and the bytes of it, each piece of memory counted once."""
    references, storages = [], {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        entry = Kept(tensor.detach())  # not an output together with what made it
        references.append(weakref.ref(entry))
        return entry

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor):
        out = graph(x)
    return out, references, sum(storages.values())


def test_every_state_is_kept_once():
    graph = make(identity)
    x = maps(5, 4)
    size = kept(graph, x)[2]
    states = sum(SIZES[:-1]) * 2 * 5 * 4
    assert size == 8 * (states + graph.num_candidates)  # the weights, zero where hallucinated
    assert kept(concatenating(graph), x)[2] > size


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_is_kept_longer_than_needed(backward):
    gc.collect()
    gc.disable()
    try:
        out, references, _ = kept(make("norm_relu_conv"), maps(5, 4))
        assert any(reference() for reference in references)
        loss = weigh(out)
        if backward:
            loss.backward()
        else:
            del loss, out
        assert not any(reference() for reference in references)
    finally:
        gc.enable()


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def count(self, *names):
        return sum(self.names.count(name) for name in names)


def test_one_product_per_block_and_direction_and_no_sums_or_copies_of_gradients():
    graph = make(identity)
    x = maps(5, 4).contiguous(memory_format=torch.channels_last)
    out_grad = torch.randn(2, SIZES[-1], 5, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with Operators() as operators:
        torch.autograd.grad(graph(x), (x, graph.candidates.weight), out_grad)
    assert operators.count("mm", "addmm", "bmm", "baddbmm", "linear") == 3 * (len(SIZES) - 1)
    assert operators.count("add", "add_") == 0
    assert operators.count("copy_", "clone") == len(SIZES) - 1  # of each state into the buffer
    assert operators.count("cat") == 1  # of the gradients of the weights


def test_a_gradient_with_the_nodes_first_is_copied_once_for_both_products():
    graph = make(identity)
    x = maps(5, 4).contiguous(memory_format=torch.channels_last)
    with Operators() as operators:
        torch.autograd.grad(graph(x), (x, graph.candidates.weight), torch.randn(2, SIZES[-1], 5, 4).double())
    assert operators.count("copy_", "clone") == len(SIZES) - 1 + 1


def test_products_are_counted_as_those_of_concatenated_states():
    graph = make()
    counts = []
    for each in (graph, concatenating(graph)):
        with FlopCounterMode(display=False) as counter:
            weigh(each(maps(5, 4))).backward()
        counts.append(counter.get_total_flops())
    places = 2 * 5 * 4
    assert counts == [2 * 3 * graph.num_candidates * places] * 2


class Cut(nn.Module):
    def forward(self, z):
        return z.detach().tanh()


@pytest.mark.parametrize("block", range(len(SIZES) - 1))
def test_a_node_function_may_cut_the_gradient(block):
    graph = make()
    graph.dynamics.node_functions[block] = Cut()
    x = maps(5, 4)
    results = [gradients(each, x) for each in (graph, concatenating(graph))]
    assert_same(*results)
    assert results[0]["candidates.weight"].any()


@pytest.mark.parametrize("block", range(1, len(SIZES)))
def test_a_loss_may_be_made_of_states_within(block):
    graph = make()
    x = maps(5, 4)
    results = []
    for each in (graph, concatenating(graph)):
        seen = []
        each.dynamics.node_functions[block].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        each.zero_grad()
        x.grad = None
        each(x)
        weigh(seen[0]).backward()
        results.append({"input": x.grad, "weight": each.candidates.weight.grad})
    assert_same(*results)
    assert results[0]["input"].any()


@pytest.mark.parametrize("frozen", ["weights", "input", "functions"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen):
    results = []
    graph = make("norm_relu_conv")
    for each in (graph, concatenating(graph)):
        x = maps(5, 4).detach().requires_grad_(frozen != "input")
        each.candidates.weight.requires_grad_(frozen != "weights")
        each.dynamics.requires_grad_(frozen != "functions")
        each.zero_grad()
        weigh(each(x)).backward()
        results.append({"input": x.grad} | {name: p.grad for name, p in each.named_parameters()})
    assert_same(*results)


def test_backward_passes_can_be_repeated():
    graph = make("norm_relu_conv")
    x = maps(5, 4)
    loss = weigh(graph(x))
    leaves = [x, *graph.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.autograd.grad(loss, x, retain_graph=True)  # a part in between
    second = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("way", ["checkpoint", "on the CPU"])
def test_saved_tensors_may_be_computed_again_or_lie_elsewhere(way):
    graph = make("norm_relu_conv")
    x = maps(5, 4)
    expected = gradients(graph, x)

    def run(x):
        if way == "checkpoint":
            return checkpoint(graph, x, use_reentrant=False)
        with torch.autograd.graph.save_on_cpu():
            return graph(x)

    run.zero_grad, run.named_parameters = graph.zero_grad, graph.named_parameters
    results = gradients(run, x)
    assert all(torch.equal(results[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_as_a_linear_layer(dtype):
    graph = make().float()
    x = maps(5, 4).float()

    def product_type(module, args):
        types.append(args[0].dtype)

    graph.dynamics.node_functions[1].register_forward_pre_hook(product_type)
    results = []
    for each in (graph, concatenating(graph)):
        types = []
        with torch.autocast("cpu", dtype=dtype):
            results.append(gradients(each, x))
        assert types == [dtype]
    assert {name: tensor.dtype for name, tensor in results[0].items()} == {
        "output": dtype,
        "input": torch.float32,
        "candidates.weight": torch.float32,
    }
    assert_same(*results, tolerance=8 * torch.finfo(dtype).eps)
    exact = gradients(graph.double(), x.double())
    assert_same(results[0], exact, tolerance=8 * torch.finfo(dtype).eps)


def test_what_memory_held_before_does_not_reach_a_product_in_half_precision():
    for seed in range(40):
        torch.manual_seed(seed)
        graph = NeuralGraph((3, 8, 4), 14, propagation="block").bfloat16().eval()
        assert graph(torch.rand(4, 3, 9, 7).bfloat16()).isfinite().all()


def test_doubles_stay_doubles_under_autocast():
    graph, x = make(), maps(5, 4)
    expected = gradients(graph, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(gradients(graph, x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_models_in_lower_precision(dtype):
    graph, x = make(), maps(5, 4)
    expected = gradients(graph, x)
    results = gradients(graph.to(dtype), x.to(dtype))
    assert all(tensor.dtype == dtype for tensor in results.values())
    assert_same(results, expected, tolerance=8 * torch.finfo(dtype).eps)


def test_other_types_than_the_weights_are_refused():
    with pytest.raises(InputError, match=r"must be a tensor of float64 .* got a tensor of float32"):
        make()(maps(5, 4).float())


@pytest.mark.parametrize("function", [nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.Flatten(0, 1)])
def test_states_that_do_not_fit_are_refused(function):
    graph = make()
    graph.dynamics.node_functions[1] = function.double()
    with pytest.raises(InputError, match=r"block 1 gave .*expected \[2, 4, 5, 4\]"):
        graph(maps(5, 4))


def test_an_empty_batch_gives_zero_gradients():
    results = gradients(make(), maps(5, 4, batch=0))
    assert results["output"].shape == (0, 3, 5, 4)
    assert not results["candidates.weight"].any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    graph, x = make(), maps(5, 4)
    expected = graph(x)
    with mode():
        assert torch.equal(graph(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_of_the_large_model_waits_for_nothing(monkeypatch, recompute):
    monkeypatch.setattr(selection, "_on_host", lambda weight: False)  # as on a GPU
    model = MobileNetV1DNW(num_classes=10, stem_stride=1, propagation="block", recompute=recompute)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 5])
    with Waits() as waits:
        for _ in range(2):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimiser.step()
        assert waits.found == []
        x.sum().item()
    assert waits.found == ["aten._local_scalar_dense.default"]


# In a process of its own: the compiler cannot look through the type checks that the other tests run under.
PROGRAM = """
import copy

import torch

from dnw_graph import Discrete, NeuralGraph

discrete = {"num_nodes": 20, "num_inputs": 6, "num_outputs": 5, "dynamics": Discrete(3)}
for options in ({"blocks": (6, 10, 12, 8)}, discrete):
    torch.compiler.reset()
    torch.manual_seed(0)
    graph = NeuralGraph(num_edges=80, propagation="auto", recompute=True, **options).double()
    twin = copy.deepcopy(graph)
    compiled = torch.compile(graph, backend="aot_eager", fullgraph=True)
    values = torch.randn(16, 6, 5, 4, dtype=torch.float64)
    results = []
    for each in (compiled, twin):
        x = values.clone().requires_grad_()
        out = each(x)
        out.square().mean().backward()
        results.append([out, x.grad, *(p.grad for p in each.parameters()), *each.buffers()])
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair)
print("same")
"""


@pytest.mark.slow
def test_compiled_gradients_are_those_of_eager():
    run = run_alone(PROGRAM)
    assert run.stdout == "same\n", run.stderr
