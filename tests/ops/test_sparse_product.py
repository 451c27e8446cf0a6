"""The sparse product against dense float64 products, numerical gradients, and PyTorch's own checks of operators."""

import io

import pytest
import torch
from pairs import every_pair
from reference import relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dnw_graph.ops.flops  # noqa: F401  # tells the counter
from dnw_graph import InputError
from dnw_graph.ops import sparse_product

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def random_csr(targets, sources, edges, dtype=torch.float64, index=torch.int64):
    """A CSR matrix with its columns in any order within a row, some of them twice, some rows empty."""
    rows = torch.randint(targets, (edges,)).sort().values
    rows[rows == targets // 2] = 0
    rows = rows.sort().values
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=targets).cumsum(0)])
    columns = torch.randint(sources, (edges,))
    return rowptr.to(index), columns.to(index), torch.randn(edges, dtype=dtype)


def dense(rowptr, columns, values, sources):
    """The same matrix in full, added up entry by entry."""
    matrix = torch.zeros(len(rowptr) - 1, sources, dtype=torch.float64)
    for target in range(len(rowptr) - 1):
        for edge in range(rowptr[target], rowptr[target + 1]):
            matrix[target, columns[edge]] += values[edge].double()
    return matrix


@every_pair(
    rest=pytest.mark.slow,
    way=["kernel", "plain"],
    features=[1, 5, 16, 17, 49, 196, 257, 1000],
    dtype=[torch.float32, torch.float64],
    index=[torch.int32, torch.int64],
    indirect=["way"],
)
def test_equals_the_dense_product(way, features, dtype, index):
    csr = random_csr(37, 50, 180, dtype, index)
    z = torch.randn(50, features, dtype=dtype)
    received = sparse_product(z, *csr)
    assert received.dtype == dtype
    assert relative_error(received, dense(*csr, 50) @ z.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("features", [16, 33, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_equals_the_dense_product_where_sources_are_copied(features, dtype, threads):
    csr = random_csr(37, 400, 1_500, dtype)
    z = torch.randn(400, features, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        received = sparse_product(z, *csr)
    finally:
        torch.set_num_threads(before)
    assert relative_error(received, dense(*csr, 400) @ z.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("features", [2_111, 4_096])
def test_equals_the_dense_product_where_columns_are_cut_into_tiles(way, features):
    csr = random_csr(33, 3_000, 2_000, torch.float32)
    z = torch.randn(3_000, features)
    assert relative_error(sparse_product(z, *csr), dense(*csr, 3_000) @ z.double()) <= 1e-5


@pytest.mark.parametrize(
    ("targets", "sources", "edges", "features"),
    [(4, 3, 0, 20), (0, 3, 0, 5), (4, 0, 0, 20), (4, 3, 6, 0), (1, 1, 1, 1)],
)
def test_empty_and_smallest_products(way, targets, sources, edges, features):
    rowptr = torch.full((targets + 1,), edges)
    rowptr[0] = 0
    columns, values = torch.zeros(edges, dtype=torch.int64), torch.randn(edges, dtype=torch.float64)
    z = torch.randn(sources, features, dtype=torch.float64, requires_grad=True)
    received = sparse_product(z, rowptr, columns, values.requires_grad_())
    assert received.shape == (targets, features)
    assert torch.equal(received, dense(rowptr, columns, values, sources) @ z)
    received.sum().backward()
    assert z.grad.shape == z.shape
    assert values.grad.shape == values.shape


def test_inputs_need_not_be_contiguous(way):
    csr = random_csr(6, 9, 30)
    z = torch.randn(40, 2 * 9, dtype=torch.float64).t()[::2]
    rowptr, columns, values = (torch.stack([part, part], dim=1)[:, 0] for part in csr)
    assert not z.is_contiguous()
    assert not values.is_contiguous()
    assert torch.equal(sparse_product(z, rowptr, columns, values), sparse_product(z.contiguous(), *csr))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_are_summed_in_float32(way, dtype):
    rowptr, columns, values = random_csr(37, 50, 180, dtype)
    z = torch.randn(50, 40).to(dtype)
    received = sparse_product(z, rowptr, columns, values)
    assert received.dtype == dtype
    expected = dense(rowptr, columns, values, 50) @ z.double()
    # Half a unit in the last place, and float32's error where terms cancel.
    assert ((received.double() - expected).abs() <= torch.finfo(dtype).eps / 2 * expected.abs() + 1e-5).all()


@pytest.mark.parametrize("features", [3_000, 2_049, 4_097])
def test_the_result_does_not_depend_on_the_number_of_threads(way, features):
    csr = random_csr(8, 64, 400, torch.float32)
    z = torch.randn(64, features)
    alone = sparse_product(z, *csr)
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(sparse_product(z, *csr), alone) for _ in range(20))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("features", [3, 70])
def test_gradients_are_numerically_right(way, index, features):
    rowptr, columns, values = random_csr(5, 6, 12, index=index)
    z = torch.randn(6, features, dtype=torch.float64, requires_grad=True)

    def run(z, values):
        return sparse_product(z, rowptr, columns, values)

    arguments = (z, values.requires_grad_())
    assert torch.autograd.gradcheck(run, arguments, fast_mode=features > 10)
    assert torch.autograd.gradgradcheck(run, arguments, fast_mode=features > 10)


def test_gradients_of_many_messages_are_formed_in_parts(monkeypatch):
    monkeypatch.setenv("DNW_GRAPH_KERNELS", "0")
    rowptr, columns, values = random_csr(5, 6, 12)
    z = torch.randn(6, 10, dtype=torch.float64)
    sparse_product(z, rowptr, columns, values.requires_grad_()).square().sum().backward()
    monkeypatch.setattr("dnw_graph.ops.csr.MAX_MESSAGES", 25)
    parts = values.detach().clone().requires_grad_()
    sparse_product(z, rowptr, columns, parts).square().sum().backward()
    torch.testing.assert_close(parts.grad, values.grad)


def test_half_precision_gradients(way):
    rowptr, columns, values = random_csr(37, 50, 180, torch.bfloat16)
    z = torch.randn(50, 40).bfloat16().requires_grad_()
    received = sparse_product(z, rowptr, columns, values.requires_grad_())
    received.backward(torch.ones_like(received))
    z64, values64 = z.detach().double().requires_grad_(), values.detach().double().requires_grad_()
    sparse_product(z64, rowptr, columns, values64).sum().backward()
    assert relative_error(z.grad.double(), z64.grad) <= 2**-8
    assert relative_error(values.grad.double(), values64.grad) <= 2**-8


def test_frozen_parts_get_no_gradient(way):
    rowptr, columns, values = random_csr(5, 6, 12)
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    sparse_product(z, rowptr, columns, values).sum().backward()
    assert z.grad is not None
    assert values.grad is None
    sparse_product(z.detach(), rowptr, columns, values.requires_grad_()).sum().backward()
    assert values.grad is not None


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        rowptr, columns, values = random_csr(5, 6, 12, torch.float32)
        self.register_buffer("rowptr", rowptr)
        self.register_buffer("columns", columns)
        self.values = nn.Parameter(values)

    def forward(self, z):
        return sparse_product(z.relu(), self.rowptr, self.columns, self.values) * 2


def test_compile_takes_it_forward_and_backward(way, unchecked):
    module, z = Product(), torch.randn(6, 20)
    expected = torch.autograd.grad(module(z).square().sum(), module.values)[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z), module(z))
    assert torch.equal(torch.autograd.grad(compiled(z).square().sum(), module.values)[0], expected)


def test_export_takes_it_and_comes_back_from_a_file(way, unchecked):
    module, z = Product(), torch.randn(6, 20)
    file = io.BytesIO()
    features = torch.export.Dim("features", min=1, max=1000)
    torch.export.save(torch.export.export(module, (z,), dynamic_shapes=({1: features},)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for other in (z, torch.randn(6, 300)):
        assert torch.equal(loaded(other), module(other))


def test_the_operators_pass_the_checks_of_operators(way, unchecked):
    rowptr, columns, values = random_csr(5, 6, 12, torch.float32)
    z = torch.randn(6, 20, requires_grad=True)
    torch.library.opcheck(torch.ops.dnw_graph.sparse_product, (z, rowptr, columns, values.requires_grad_()))
    received = torch.randn(5, 20, requires_grad=True)
    torch.library.opcheck(torch.ops.dnw_graph.sampled_product, (received, z, rowptr, columns))


def test_operations_are_counted_as_those_of_the_dense_product_of_all_pairs():
    rowptr, columns = torch.arange(0, 21, 5), torch.arange(5).repeat(4)
    z, values = torch.randn(5, 7, requires_grad=True), torch.randn(20, requires_grad=True)
    matrix = torch.randn(4, 5, requires_grad=True)
    with FlopCounterMode(display=False) as sparse:
        sparse_product(z, rowptr, columns, values).sum().backward()
    with FlopCounterMode(display=False) as full:
        (matrix @ z).sum().backward()
    assert sparse.get_total_flops() == full.get_total_flops()


Z = torch.zeros(3, 2)
CSR = (torch.tensor([0, 1, 2]), torch.tensor([0, 2]), torch.ones(2))
BAD = {
    "a column out of range": (Z, CSR[0], torch.tensor([0, 3]), CSR[2]),
    "a negative column": (Z, CSR[0], torch.tensor([-1, 0]), CSR[2]),
    "row pointers past the end": (Z, torch.tensor([0, 1, 3]), *CSR[1:]),
    "row pointers short of the end": (Z, torch.tensor([0, 1, 1]), *CSR[1:]),
    "row pointers that do not start at 0": (Z, torch.tensor([1, 1, 2]), *CSR[1:]),
    "row pointers that fall": (Z, torch.tensor([0, 5, 2]), *CSR[1:]),
    "no row pointer": (Z, torch.zeros(0, dtype=torch.int64), *CSR[1:]),
    "fewer values than columns": (Z, *CSR[:2], torch.ones(1)),
    "maps that are not flat": (Z.view(3, 1, 2), *CSR),
    "two integer types": (Z, CSR[0].int(), *CSR[1:]),
    "another integer type": (Z, CSR[0].short(), CSR[1].short(), CSR[2]),
    "two floating-point types": (Z.double(), *CSR),
    "integers": (Z.long(), *CSR[:2], CSR[2].long()),
    "two devices": (Z.to("meta"), *CSR),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_wrong_input_is_refused(way, arguments, unchecked):
    with pytest.raises(InputError) as error:
        sparse_product(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("received", [torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2, 2).double()])
def test_the_gradient_refuses_wrong_input_too(way, received):
    columns = torch.tensor([0, 3]) if received.shape == (2, 2) else CSR[1]
    with pytest.raises(InputError):
        torch.ops.dnw_graph.sampled_product(received, Z, CSR[0], columns)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gives_the_same():
    csr = random_csr(37, 50, 180)
    z = torch.randn(50, 40, dtype=torch.float64)
    received = sparse_product(z.cuda(), *(part.cuda() for part in csr))
    assert relative_error(received.cpu(), sparse_product(z, *csr)) <= 1e-13
