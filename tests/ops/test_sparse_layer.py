"""Linear layers and convolutions over some of their weights, against PyTorch's dense ones in float64."""

import io
import random

import pytest
import torch
import torch.nn.functional as F
from reference import relative_error
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dnw_graph.ops.flops  # noqa: F401  # tells the counter
from dnw_graph import InputError
from dnw_graph.ops import sparse_conv2d, sparse_linear
from dnw_graph.ops.layer import plain_call

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def sparse(*shape, share=0.3, dtype=torch.float64, index=torch.int32):
    """A weight with zeros, some outputs without any weight, and the same in CSR with the places in any order."""
    weight = torch.randn(*shape, dtype=dtype) * (torch.rand(shape) < share)
    weight[len(weight) // 2] = 0
    counts, columns, values = [0], [], []
    for row in weight.flatten(1):
        places = row.nonzero().flatten()
        places = places[torch.randperm(len(places))]
        counts.append(counts[-1] + len(places))
        columns.append(places)
        values.append(row[places])
    return weight, (torch.tensor(counts).to(index), torch.cat(columns).to(index), torch.cat(values))


@pytest.mark.parametrize("case", range(12))
def test_linear(way, case):
    draw = random.Random(case)
    batch, inputs, outputs = [0, 1, 2, 16, 37, 300][case % 6], draw.choice([1, 7, 40, 3000]), draw.choice([1, 5, 33])
    dtype, index = draw.choice([torch.float32, torch.float64]), draw.choice([torch.int32, torch.int64])
    relu = draw.random() < 0.5
    weight, csr = sparse(outputs, inputs, dtype=dtype, index=index)
    x, bias = torch.randn(batch, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    expected = expected.relu() if relu else expected
    result = sparse_linear(x, *csr, bias, relu)
    assert result.dtype == dtype
    assert result.shape == expected.shape
    assert relative_error(result, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("case", range(30))
def test_convolution(way, case):
    draw = random.Random(case)
    inputs, outputs, groups = [(1, 1, 1), (5, 9, 1), (12, 8, 4), (6, 6, 6)][case % 4]
    maps = draw.choice([(4, 7), (8, 8), (13, 20), (33, 40)])
    kernel, stride, padding, dilation = (
        draw.choice(choices)
        for choices in (
            [(1, 1), (3, 3), (2, 5)],
            [(1, 1), (2, 2), (3, 1)],
            [(0, 0), (1, 1), (3, 2)],
            [(1, 1), (2, 1)],
        )
    )
    batch, dtype = draw.choice([0, 1, 2, 9]), draw.choice([torch.float32, torch.float64])
    ends = ["", "bias", "bias, add, relu"][case % 3]
    weight, csr = sparse(outputs, inputs // groups, *kernel, dtype=dtype)
    x, bias = torch.randn(batch, inputs, *maps, dtype=dtype), torch.randn(outputs, dtype=dtype)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    bias = bias if "bias" in ends else None
    expected = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), **options)
    add = torch.randn(expected.shape, dtype=dtype) if "add" in ends else None
    expected = expected if add is None else (expected + add).relu()
    result = sparse_conv2d(x, *csr, bias, kernel=kernel, **options, add=add, relu=add is not None)
    assert relative_error(result, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("threads", [1, 3])
def test_many_channels_are_cut_into_tiles_and_images_into_sets(has_compiler, threads):
    weight, csr = sparse(20, 700, 1, 1, dtype=torch.float32)
    _, small = sparse(20, 700, 3, 3, share=0.02, dtype=torch.float32)
    x, y = torch.randn(2, 700, 33, 32), torch.randn(40, 700, 5, 5)
    alone = [sparse_conv2d(x, *csr, kernel=(1, 1)), sparse_conv2d(y, *small, kernel=(3, 3), padding=(1, 1))]
    assert relative_error(alone[0], F.conv2d(x.double(), weight.double())) <= 1e-5
    torch.set_num_threads(threads)
    try:
        again = [sparse_conv2d(x, *csr, kernel=(1, 1)), sparse_conv2d(y, *small, kernel=(3, 3), padding=(1, 1))]
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, alone, again))


def test_nan_reaches_what_its_weights_lead_to_and_nothing_else(has_compiler):
    csr = (torch.tensor([0, 1, 2]), torch.tensor([0, 9]), torch.ones(2))
    x = torch.randn(1, 2, 6, 6)
    x[0, 1] = torch.nan
    result = sparse_conv2d(x, *csr, kernel=(3, 3), padding=(1, 1))
    assert result[0, 0].isfinite().all()
    assert result[0, 1, 1:, 1:].isnan().all()
    assert (result[0, 1, 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_computed_in_float32(way, dtype):
    weight, csr = sparse(8, 3, 3, 3, dtype=dtype)
    x = torch.randn(2, 3, 9, 9).to(dtype)
    result = sparse_conv2d(x, *csr, kernel=(3, 3))
    assert result.dtype == dtype
    torch.testing.assert_close(result, F.conv2d(x.float(), weight.float()).to(dtype))


def assert_same_gradients(call, dense_call, x, weight, csr):
    """Those of inputs and weights, beside PyTorch's in float64."""
    rowptr, columns, values = csr
    x, values = x.requires_grad_(), values.requires_grad_()
    exact, dense = (each.detach().double().requires_grad_() for each in (x, weight))
    out, expected = call(x, rowptr, columns, values), dense_call(exact, dense)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    rows = torch.repeat_interleave(rowptr.diff())
    assert relative_error(x.grad, exact.grad) <= TOLERANCE[x.dtype]
    assert relative_error(values.grad, dense.grad.flatten(1)[rows, columns.long()]) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("case", range(20))
def test_gradients_of_a_convolution(way, case):
    draw = random.Random(case)
    inputs, outputs, groups = [(1, 1, 1), (5, 9, 1), (12, 8, 4), (6, 6, 6), (40, 30, 2)][case % 5]
    kernel, options = [
        ((1, 1), {}),
        ((1, 1), {"stride": (2, 2)}),
        ((3, 3), {"padding": (1, 1)}),
        ((3, 3), {"padding": (1, 1), "stride": (2, 2)}),
        ((3, 3), {"padding": (2, 1), "dilation": (2, 1)}),
        ((2, 5), {"padding": (0, 3), "stride": (3, 1)}),
        ((2, 2), {"stride": (3, 3)}),
    ][case % 7]
    dtype, index = draw.choice([torch.float32, torch.float64]), draw.choice([torch.int32, torch.int64])
    maps, batch = draw.choice([(7, 7), (8, 8), (13, 20), (33, 40)]), draw.choice([1, 2, 9])
    weight, csr = sparse(outputs, inputs // groups, *kernel, dtype=dtype, index=index)

    def call(x, *csr):
        return sparse_conv2d(x, *csr, kernel=kernel, groups=groups, **options)

    def dense_call(x, weight):
        return F.conv2d(x, weight, groups=groups, **options)

    assert_same_gradients(call, dense_call, torch.randn(batch, inputs, *maps, dtype=dtype), weight, csr)


@pytest.mark.parametrize("batch", [54, 61, 62, 63, 64, 70, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kernel", "maps", "stride"), [(1, 3, 1), (1, 5, 2), (3, 4, 1)])
def test_gradients_of_a_last_set_of_images_that_is_not_full(has_compiler, batch, dtype, kernel, maps, stride):
    """So many channels that few images stay in cache together."""
    weight, csr = sparse(32, 512, kernel, kernel, share=0.05, dtype=dtype)
    options = {"padding": (kernel // 2, kernel // 2), "stride": (stride, stride)}

    def call(x, *csr):
        return sparse_conv2d(x, *csr, kernel=(kernel, kernel), **options)

    x = torch.randn(batch, 512, maps, maps, dtype=dtype)
    assert_same_gradients(call, lambda x, weight: F.conv2d(x, weight, **options), x, weight, csr)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0), (0, 0)])
def test_gradients_without_inputs_or_outputs(way, inputs, outputs):
    rowptr, columns, values = (
        torch.zeros(outputs + 1, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0),
    )
    x, bias = torch.randn(2, 3, inputs, requires_grad=True), torch.randn(outputs, requires_grad=True)
    out = sparse_linear(x, rowptr, columns, values.requires_grad_(), bias)
    out.sum().backward()
    assert out.shape == (2, 3, outputs)
    assert torch.equal(x.grad, torch.zeros(2, 3, inputs))
    assert torch.equal(bias.grad, torch.full((outputs,), 6.0))
    assert values.grad.shape == (0,)


def test_gradients_with_edges_that_the_kernels_do_not_read(way):
    class Named(torch.Tensor):
        pass

    rowptr, columns = (each.as_subclass(Named) for each in (torch.arange(0, 33, 4), torch.arange(4).repeat(8)))
    x, values = torch.randn(5, 4), torch.randn(32, requires_grad=True)
    sparse_linear(x, rowptr, columns, values).sum().backward()
    torch.testing.assert_close(values.grad, x.sum(0).repeat(8))


@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(1, 7, 33), (16, 40, 5), (37, 300, 20), (300, 20, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_linear_layer(way, batch, inputs, outputs, dtype):
    weight, csr = sparse(outputs, inputs, dtype=dtype)
    assert_same_gradients(sparse_linear, F.linear, torch.randn(batch, inputs, dtype=dtype), weight, csr)


@pytest.mark.parametrize(("batch", "side"), [(8, 12), (3, 19), (5, 21)])
def test_gradients_with_several_threads(has_compiler, batch, side):
    found = []
    for threads in (1, 3):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        try:
            _, (rowptr, columns, values) = sparse(64, 64, 3, 3, dtype=torch.float32)
            x, values = torch.randn(batch, 64, side, side).requires_grad_(), values.requires_grad_()
            sparse_conv2d(x, rowptr, columns, values, kernel=(3, 3), padding=(1, 1)).square().sum().backward()
            found.append((x.grad, values.grad))
        finally:
            torch.set_num_threads(1)
    assert all(map(torch.equal, *found))


def test_gradients_refuse_wrong_edges(has_compiler):
    x = torch.randn(3, 4, requires_grad=True)
    grad = torch.ops.dnw_graph.sparse_linear_grad
    with pytest.raises(InputError, match="rowptr must ascend"):
        grad(torch.ones(3, 2), x.detach(), torch.tensor([0, 1, 2]), torch.tensor([0, 4]), torch.ones(2), True, True)


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_are_numerically_right(way, relu):
    _, (rowptr, columns, values) = sparse(6, 2, 3, 3)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    bias, add = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6,), (2, 6, 4, 4)))

    def run(x, values, bias, add):
        options = {"stride": (2, 2), "padding": (1, 1), "groups": 2, "relu": relu}
        return sparse_conv2d(x, rowptr, columns, values, bias, kernel=(3, 3), add=add, **options)

    assert torch.autograd.gradcheck(run, (x, values.requires_grad_(), bias, add), fast_mode=True)
    _, (rows, places, numbers) = sparse(6, 5)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    arguments = (x, numbers.requires_grad_(), bias)
    assert torch.autograd.gradcheck(lambda x, w, b: sparse_linear(x, rows, places, w, b, relu), arguments)


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (
            torch.nn.ParameterList([torch.nn.Parameter(each, requires_grad=each.is_floating_point()) for each in csr])
            for _, csr in (sparse(6, 3, 3, 3, dtype=torch.float32), sparse(5, 6, dtype=torch.float32))
        )

    def forward(self, x):
        # Not every supported compiler can unpack a ParameterList.
        first, second = ([part[n] for n in range(len(part))] for part in (self.first, self.second))
        return sparse_linear(sparse_conv2d(x, *first, kernel=(3, 3), relu=True).mean((2, 3)), *second)


def test_compile_and_export_take_them(way, unchecked):
    module, x = Layers(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    file = io.BytesIO()
    batch = torch.export.Dim("batch", min=1, max=100)
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: batch},)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for other in (x, torch.randn(5, 3, 8, 8)):
        assert torch.equal(loaded(other), module(other))


def test_the_operators_pass_the_checks_of_operators(way, unchecked):
    _, csr = sparse(6, 3, 3, 3, dtype=torch.float32)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    window = [3, 3, 1, 1, 0, 0, 1, 1]
    torch.library.opcheck(torch.ops.dnw_graph.sparse_convolution, (x, *csr, None, None, window, 1, False))
    _, csr = sparse(6, 3, dtype=torch.float32)
    torch.library.opcheck(torch.ops.dnw_graph.sparse_linear, (torch.randn(4, 3), *csr, torch.randn(6), True))


def test_under_autocast_of_their_device_operators_are_dispatched(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
    assert not plain_call(x, None)
    assert plain_call(torch.empty(2, 3), None)


def test_operations_are_counted_over_the_weights():
    weight, csr = sparse(6, 3, 3, 3, share=1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        sparse_conv2d(x, *csr, kernel=(3, 3))
        sparse_linear(torch.randn(4, 7, 30), torch.tensor([0, 2]), torch.tensor([3, 9]), torch.ones(2))
    assert counter.get_total_flops() == 2 * int(weight.count_nonzero()) * 2 * 36 + 2 * 2 * 4 * 7


X = torch.zeros(1, 2, 4, 4)
CSR = (torch.tensor([0, 1, 2]), torch.tensor([0, 17]), torch.ones(2))
BAD = {
    "a place out of range": {"columns": torch.tensor([0, 18])},
    "a negative place": {"columns": torch.tensor([-1, 0])},
    "row pointers past the end": {"rowptr": torch.tensor([0, 1, 3])},
    "row pointers that fall": {"rowptr": torch.tensor([0, 5, 2])},
    "no row pointer": {"rowptr": torch.zeros(0, dtype=torch.int64)},
    "fewer values": {"values": torch.ones(1)},
    "a matrix": {"x": torch.zeros(2, 16)},
    "another type": {"x": X.double()},
    "whole numbers": {"x": X.long()},
    "a short bias": {"bias": torch.ones(1)},
    "another shape to add": {"add": torch.ones(1, 2, 4, 4)},
    "one stride": {"stride": (1,)},
    "no stride": {"stride": (0, 1)},
    "a negative padding": {"padding": (-1, 0)},
    "a huge padding": {"padding": (2**40, 0)},
    "a huge kernel": {"kernel": (2**31, 3)},
    "three groups": {"groups": 3},
    "no groups": {"groups": 0},
    "maps that are too small": {"dilation": (2, 2)},
    "empty maps": {"x": torch.zeros(1, 2, 0, 4), "padding": (2, 2)},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_wrong_input_is_refused(way, changes, unchecked):
    given = {"x": X, "rowptr": CSR[0], "columns": CSR[1], "values": CSR[2], "kernel": (3, 3)}
    with pytest.raises(InputError) as error:
        sparse_conv2d(**(given | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", [-1, 5])
@pytest.mark.parametrize("batch", [1, 40])
def test_a_linear_layer_refuses_places_out_of_range(way, place, batch):
    with pytest.raises(InputError):
        sparse_linear(torch.zeros(batch, 5), torch.tensor([0, 1, 2]), torch.tensor([0, place]), torch.ones(2))
