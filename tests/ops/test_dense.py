import pytest
import torch

from dnw_graph import _compat
from dnw_graph.ops.dense import product_with_transpose


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7, 300), (64, 32, 2000), (1, 1, 1), (3, 4, 0), (0, 4, 5)])
def test_equals_a_product_in_float64(shape, dtype):
    m, n, k = shape
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    result = product_with_transpose(a, b)
    assert result.dtype == dtype
    expected = torch.einsum("mk,nk->mn", a.double(), b.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (result.double() - expected).norm() <= tolerance * expected.norm()


def test_without_the_other_library(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    a, b = torch.randn(5, 30), torch.randn(4, 30)
    torch.testing.assert_close(product_with_transpose(a, b), a @ b.t())


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_writes_to_a_part_of_a_larger_matrix(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    a, b = torch.randn(5, 30), torch.randn(4, 30)
    whole = torch.zeros(5, 9)
    part = whole[:, 3:7]
    assert product_with_transpose(a, b, out=part) is part
    torch.testing.assert_close(whole, torch.nn.functional.pad(a @ b.t(), (3, 2)))


@pytest.mark.parametrize("supported", [True, False])
def test_half_precision_rounds_factors_and_result_only(monkeypatch, supported):
    if supported and not _compat.has_bfloat16_products():
        pytest.skip("this processor has no products of bfloat16")
    monkeypatch.setattr("dnw_graph.ops.dense.has_bfloat16_products", lambda: supported)
    a, b = torch.randn(5, 10_000).bfloat16(), torch.randn(4, 10_000).bfloat16()
    out = torch.empty(5, 4)
    product_with_transpose(a, b, out=out)
    # Sums in bfloat16 would be off by some percent.
    torch.testing.assert_close(out, (a.double() @ b.double().t()).float(), rtol=2**-8, atol=1e-2)
    assert torch.equal(out, out.bfloat16().float())
