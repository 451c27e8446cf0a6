import pytest
import torch

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
