"""The fused static graph against a plain loop over nodes in float64, and against NeuralGraph on real images."""

import io

import pytest
import torch
from pairs import every_pair, every_value
from reference import relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import dnw_graph.ops.flops  # noqa: F401  # tells the counter
from dnw_graph import InputError, NeuralGraph
from dnw_graph.ops import static_graph

CASES = {
    "one block": ((3,), (1,)),
    "one block that passes": ((3,), (0,)),
    "one block of stride 2": ((3,), (2,)),
    "inputs pass": ((3, 4, 2), (0, 1, 0)),
    "functions at the outputs": ((3, 4, 2), (1, 1, 1)),
    "inputs of stride 2": ((3, 5, 4, 2), (2, 1, 1, 0)),
    "two stages in one": ((3, 5, 6, 7, 2), (1, 1, 2, 1, 0)),
    "strides that follow on each other": ((3, 5, 4), (2, 2, 2)),
    "a block without a node": ((3, 0, 4), (1, 1, 0)),
    "more nodes than a thread takes at a time": ((17, 33, 21), (1, 2, 0)),
}


def random_graph(sizes, strides, density=0.5, dtype=torch.float64, bias=False, index=torch.int64):
    """Random edges from all earlier blocks with maps of the same size; some nodes get none."""
    rowptr, columns = [0], []
    start, first = sizes[0], 0
    for number, size in enumerate(sizes[1:], start=1):
        if strides[number - 1] == 2:
            first = start - sizes[number - 1]
        for node in range(size):
            chosen = [u for u in range(first, start) if torch.rand(()) < density] if node != 1 else []
            columns += reversed(chosen)
            rowptr.append(len(columns))
        start += size
    functions = sum(size for size, stride in zip(sizes, strides, strict=True) if stride)
    values, scale, shift = (torch.randn(n, dtype=dtype) for n in (len(columns), functions, functions))
    kernel = torch.randn(functions, 3, 3, dtype=dtype)
    arguments = [sizes, strides, torch.tensor(rowptr, dtype=index), torch.tensor(columns, dtype=index), values]
    return [*arguments, scale, shift, kernel, torch.randn(functions, dtype=dtype) if bias else None]


def plain_loop(x, sizes, strides, rowptr, columns, values, scale, shift, kernel, bias, state_scale=None):
    """Every node by itself, in float64."""
    states, function, maps = [], 0, x.shape[2:]
    for block, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        for node in range(size):
            if block == 0:
                state = x[:, node].double()
            else:
                row = len(states) - sizes[0]
                state = torch.zeros(len(x), *maps, dtype=torch.float64)
                for edge in range(rowptr[row], rowptr[row + 1]):
                    state = state + values[edge].double() * states[columns[edge]]
            if stride:
                state = (scale[function].double() * state + shift[function].double()).relu()
                weight = kernel[function].double()[None, None]
                state = F.conv2d(state[:, None], weight, stride=stride, padding=1)[:, 0]
                if bias is not None:
                    state = (state + bias[function].double()).relu()
                function += 1
            if state_scale is not None and block + 1 < len(sizes):
                unit = state_scale[len(states)].double()
                state = unit * (state / unit).round().clamp(-127, 127)
            states.append(state)
        if size:
            maps = states[-1].shape[1:]
    return torch.stack(states[-sizes[-1] :], dim=1)


@every_pair(rest=pytest.mark.slow, way=["kernel", "plain"], case=CASES, bias=[False, True], indirect=["way"])
def test_equals_a_plain_loop_over_nodes(way, case, bias):
    graph = random_graph(*CASES[case], bias=bias)
    for height, width in ((1, 1), (8, 8), (5, 19), (33, 6)):
        x = torch.randn(2, graph[0][0], height, width, dtype=torch.float64)
        assert relative_error(static_graph(x, *graph), plain_loop(x, *graph)) <= 1e-12


@every_pair(
    rest=pytest.mark.slow,
    way=["kernel", "plain"],
    side=[7, 14, 15, 16, 17, 28, 56],
    index=[torch.int32, torch.int64],
    indirect=["way"],
)
def test_equals_a_plain_loop_over_nodes_in_float32(way, side, index):
    graph = random_graph((4, 6, 5, 3), (1, 2, 1, 0), dtype=torch.float32, index=index)
    x = torch.randn(2, 4, side, side)
    assert relative_error(static_graph(x, *graph), plain_loop(x, *graph)) <= 1e-5


@every_pair(rest=pytest.mark.slow, way=["kernel", "plain"], case=CASES, bias=[False, True], indirect=["way"])
def test_states_in_int8(way, case, bias):
    graph = random_graph(*CASES[case], bias=bias, dtype=torch.float32 if way == "kernel" else torch.float64)
    scale = 0.02 + torch.rand(sum(graph[0]), dtype=graph[4].dtype) / 10  # Some states are cut off.
    for height, width in ((1, 1), (8, 8), (5, 19), (33, 6)):
        x = torch.randn(2, graph[0][0], height, width, dtype=graph[4].dtype)
        out = static_graph(x, *graph, state_dtype=torch.int8, state_scale=scale)
        expected = plain_loop(x, *graph, scale)
        if way == "plain" or len(graph[0]) == 1:
            assert relative_error(out, expected) <= (1e-10 if way == "plain" else 1e-5)
        else:  # A rounding in 16 bits, after which a few states round the other way.
            assert relative_error(out, expected) <= 3e-3


@pytest.mark.parametrize("edges", [1, 2, 63, 1024, 1025])
def test_sums_of_int8_states_do_not_overflow(way, edges):
    sizes, strides, sign = (edges, 2), (1, 0), torch.tensor([1.0, -1.0])
    rowptr, columns = torch.tensor([0, edges, 2 * edges]), torch.arange(edges).repeat(2)
    values = (sign[:, None] * (0.1 + torch.rand(2, edges))).flatten()
    scale, kernel = 0.1 + torch.rand(edges), torch.ones(edges, 3, 3)
    graph = (sizes, strides, rowptr, columns, values, torch.ones(edges), torch.zeros(edges), kernel)
    out = static_graph(
        torch.full((1, edges, 3, 3), 1e6),
        *graph,
        state_dtype=torch.int8,
        state_scale=torch.cat([scale, torch.ones(2)]),
    )
    expected = 127 * (values.view(2, edges) @ scale)[None, :, None, None].expand(1, 2, 3, 3)
    assert relative_error(out, expected) <= (2e-2 if way == "kernel" and edges <= 1024 else 1e-5)


@every_value(rest=pytest.mark.slow, node_function=["norm_relu_conv", "norm_relu_conv_norm_relu"], stride=[1, 2])
def test_equals_a_neural_graph_with_its_norms_folded(way, node_function, stride, digits):
    images = digits[0][:480].view(60, 8, 8, 8)  # Eight digits are the maps of eight nodes.
    graph = NeuralGraph((8, 12, 10, 6), 150, wiring="random_graph", node_function=node_function, stride=stride).double()
    for _ in range(20):
        graph(images)  # Running statistics of real images.
    graph.eval()
    affine = {"norm": [], "norm2": []}
    kernels = []
    for function, _ in graph.dynamics.functions()[:-1]:
        kernels.append(function.conv.weight[:, 0])
        for name in affine:
            if hasattr(function, name):
                norm = getattr(function, name)
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                affine[name].append(torch.stack([scale, norm.bias - scale * norm.running_mean]))
    scale, shift = torch.cat(affine["norm"], dim=1)
    kernel, bias = torch.cat(kernels), None
    if affine["norm2"]:
        scale2, bias = torch.cat(affine["norm2"], dim=1)
        kernel = scale2.view(-1, 1, 1) * kernel
    sources, targets = graph.edge_index
    rowptr = torch.searchsorted(targets, torch.arange(8, graph.num_nodes + 1))
    arguments = (graph.blocks, (stride, 1, 1, 0), rowptr, sources, graph.edge_weight, scale, shift, kernel, bias)
    with torch.no_grad():
        assert relative_error(static_graph(images, *arguments), graph(images)) <= 1e-12


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 5])
def test_the_result_does_not_depend_on_the_number_of_threads_or_the_batch(way, batch):
    graph = random_graph((8, 33, 20, 9), (1, 2, 1, 0), 0.2, torch.float32)
    x = torch.randn(batch, 8, 12, 12)
    singly = [static_graph(image[None], *graph) for image in x]
    torch.set_num_threads(3)
    try:
        out = static_graph(x, *graph)
    finally:
        torch.set_num_threads(1)
    assert out.shape == (batch, 9, 6, 6)
    torch.testing.assert_close(out, torch.cat([*singly, out[:0]]), rtol=0, atol=0 if way == "kernel" else 1e-5)


def test_threads_wait_for_each_other_between_blocks(way):
    # Nine nodes are two groups of four and one: whoever takes the one is done first.
    graph = random_graph((8, 9, 9, 9, 9), (1, 1, 1, 1, 0), 1.0, torch.float32)
    images = torch.randn(8, 1, 8, 200, 200)  # Others each time: memory may still hold what the last image left.
    alone = [static_graph(x, *graph) for x in images]
    torch.set_num_threads(3)
    try:
        together = [static_graph(x, *graph) for x in images]
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(together, alone, rtol=0, atol=0 if way == "kernel" else 1e-2)


def test_inputs_need_not_be_contiguous(way):
    graph = random_graph((3, 5, 2), (1, 1, 0))
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected = static_graph(x, *graph)
    torch.testing.assert_close(static_graph(x.contiguous(memory_format=torch.channels_last), *graph), expected)
    graph[7] = graph[7].transpose(1, 2).contiguous().transpose(1, 2)
    graph[2], graph[3], graph[4] = (torch.stack([part, part], dim=1)[:, 0] for part in graph[2:5])
    torch.testing.assert_close(static_graph(x.expand(2, 3, 9, 8), *graph), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_computed_in_float32(way, dtype):
    graph = random_graph((4, 6, 3), (1, 2, 0), dtype=dtype, bias=True)
    x = torch.randn(2, 4, 9, 9).to(dtype)
    out = static_graph(x, *graph)
    assert out.dtype == dtype
    expected = plain_loop(x, *graph)
    assert ((out.double() - expected).abs() <= torch.finfo(dtype).eps / 2 * expected.abs() + 1e-4).all()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_not_a_number_stays_one_where_the_convolution_takes_it(way, stride, bias):
    graph = random_graph((2, 3, 2), (stride, 1, 1), 1.0, bias=bias)
    x = torch.randn(1, 2, 20, 20, dtype=torch.float64)
    x[0, 1, 10, 10] = torch.nan
    out = static_graph(x, *graph)
    assert torch.equal(out.isnan(), plain_loop(x, *graph).isnan())
    assert out.isnan().any()
    assert not out.isnan().all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (14, 14), (20, 20)])
@pytest.mark.parametrize("stride", [1, 2])
def test_not_a_number_stays_in_its_own_node(way, stride, size):
    x, one = torch.ones(1, 3, *size), torch.ones(6)
    x[0, 1] = torch.nan
    edges = torch.arange(4), torch.arange(3), one[:3]  # from each input to one node
    out = static_graph(x, [3, 3], [1, stride], *edges, one, 0 * one, one.view(-1, 1, 1).expand(-1, 3, 3))
    assert out[0, 1].isnan().all()
    assert out[0, [0, 2]].isfinite().all()


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.sizes, self.strides, *tensors, _ = random_graph((3, 5, 2), (1, 2, 0), dtype=torch.float32)
        for number, tensor in enumerate(tensors):
            self.register_buffer(f"tensor{number}", tensor)

    def forward(self, x):
        return static_graph(x * 2, self.sizes, self.strides, *self.buffers()) + 1


def test_compile_takes_it(way, unchecked):
    module, x = Graph(), torch.randn(2, 3, 9, 8)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


def test_export_takes_it_and_comes_back_from_a_file(way, unchecked):
    module, x = Graph(), torch.randn(2, 3, 9, 8)
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for other in (x, torch.randn(5, 3, 9, 8)):
        torch.testing.assert_close(loaded(other), module(other))


def test_the_operator_passes_the_checks_of_operators(way, unchecked):
    graph = random_graph((3, 5, 2), (1, 2, 0), dtype=torch.float32, bias=True)
    torch.library.opcheck(torch.ops.dnw_graph.static_graph, (torch.randn(2, 3, 9, 8), *map(_listed, graph)))


def _listed(argument):
    return list(argument) if isinstance(argument, tuple) else argument


def test_a_gradient_is_refused(way):
    graph = random_graph((3, 5, 2), (1, 1, 0))
    out = static_graph(torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True), *graph)
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()


def test_operations_are_counted_as_those_of_dense_layers(way):
    graph = random_graph((3, 5, 4, 2), (2, 1, 2, 0), 1.0)
    graph[2] = torch.arange(5 + 4 + 2 + 1)  # One edge for each node after the inputs.
    graph[3], graph[4] = torch.tensor([0] * 5 + [3] * 4 + [8] * 2), torch.randn(11, dtype=torch.float64)
    layers = nn.Sequential(
        nn.Conv2d(3, 3, 3, 2, 1, groups=3, bias=False),
        nn.Conv2d(3, 5, 1, bias=False),
        nn.Conv2d(5, 5, 3, 1, 1, groups=5, bias=False),
        nn.Conv2d(5, 4, 1, bias=False),
        nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False),
        nn.Conv2d(4, 2, 1, bias=False),
    )
    x = torch.randn(2, 3, 9, 11)
    with FlopCounterMode(display=False) as dense:
        layers(x)
    pointwise = 2 * 2 * (5 * 3 * 5 * 6 + 4 * 5 * 5 * 6 + 2 * 4 * 3 * 3)
    one_edge_each = 2 * 2 * (5 * 5 * 6 + 4 * 5 * 6 + 2 * 3 * 3)
    with FlopCounterMode(display=False) as sparse:
        static_graph(x.double(), *graph)
    assert sparse.get_total_flops() == dense.get_total_flops() - pointwise + one_edge_each


def wrong(**changes):
    names = ("sizes", "strides", "rowptr", "columns", "values", "scale", "shift", "kernel", "bias")
    graph = dict(zip(names, random_graph((3, 2, 2), (1, 2, 0), 1.0), strict=True))
    # Nodes 3 and 4 begin the smaller maps; node 4 and node 6 get no edge.
    assert graph["columns"].tolist() == [2, 1, 0, 4, 3]
    return {"x": torch.zeros(1, 3, 6, 6, dtype=torch.float64)} | graph | changes


BAD = {
    "an edge from maps of another size": {"columns": torch.tensor([2, 1, 0, 4, 2])},
    "an edge from the own block": {"columns": torch.tensor([2, 1, 3, 4, 3])},
    "an edge from a later block": {"columns": torch.tensor([5, 1, 0, 4, 3])},
    "a source that there is not": {"columns": torch.tensor([2, 1, 0, 4, 7])},
    "a negative source": {"columns": torch.tensor([2, 1, -1, 4, 3])},
    "row pointers past the end": {"rowptr": torch.tensor([0, 3, 3, 5, 6])},
    "row pointers that fall": {"rowptr": torch.tensor([0, 9, 3, 5, 5])},
    "too few row pointers": {"rowptr": torch.tensor([0, 3, 5])},
    "a stride of 3": {"strides": (1, 3, 0)},
    "a stride too few": {"strides": (1, 2)},
    "no block": {"sizes": (), "strides": ()},
    "a negative size": {"sizes": (3, -2, 6)},
    "an input of other channels": {"x": torch.zeros(1, 4, 6, 6, dtype=torch.float64)},
    "an input without a batch": {"x": torch.zeros(3, 6, 6, dtype=torch.float64)},
    "a map without a place": {"x": torch.zeros(1, 3, 0, 6, dtype=torch.float64)},
    "a scale too few": {"scale": torch.zeros(4, dtype=torch.float64)},
    "a shift for the outputs": {"shift": torch.zeros(7, dtype=torch.float64)},
    "a wrong bias": {"bias": torch.zeros(1, dtype=torch.float64)},
    "maps that no memory holds": {"x": torch.zeros(1, 1, 1, 1, dtype=torch.float64).expand(1, 3, 1, 2**61)},
    "more nodes than any memory holds": {"sizes": (3, 2**62, 2)},
    "a sparse tensor of PyTorch": {"values": torch.ones(5, dtype=torch.float64).to_sparse()},
    "kernels of side 5": {"kernel": torch.zeros(5, 5, 5, dtype=torch.float64)},
    "another type": {"x": torch.zeros(1, 3, 6, 6)},
    "two integer types": {"columns": torch.tensor([2, 1, 0, 4, 3], dtype=torch.int32)},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_wrong_input_is_refused(way, changes, unchecked):
    static_graph(**wrong())
    with pytest.raises(InputError) as error:
        static_graph(**wrong(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gives_the_same():
    graph = random_graph((4, 6, 5, 3), (1, 2, 1, 0), bias=True)
    x = torch.randn(2, 4, 14, 14, dtype=torch.float64)
    on_device = [part.cuda() if isinstance(part, torch.Tensor) else part for part in graph]
    assert relative_error(static_graph(x.cuda(), *on_device).cpu(), static_graph(x, *graph)) <= 1e-12
