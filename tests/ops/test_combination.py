"""Fused linear combinations and the error norm of a solver, against float64 arithmetic term by term."""

import pytest
import torch

from dnw_graph.ops.combination import combination, error_norm


@pytest.mark.parametrize("count", [1, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_the_arithmetic_term_by_term(way, count, dtype):
    terms = [torch.randn(count, dtype=dtype) for _ in range(3)]
    base, after = torch.randn(2, count, dtype=dtype)
    c = torch.tensor([0.5, 0.0, -2.0], dtype=dtype)
    expected = sum(factor * term.double() for factor, term in zip(c.tolist(), terms, strict=True))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(combination(None, c, terms).double(), expected, **tolerance)
    torch.testing.assert_close(combination(base, c, terms).double(), base.double() + expected, **tolerance)
    scaled = expected / (1e-2 + 1e-1 * torch.max(base.double().abs(), after.double().abs()))
    wanted = scaled.square().mean().sqrt().item()
    assert error_norm(c, terms, base, after, 1e-1, 1e-2) == pytest.approx(wanted, rel=tolerance["rtol"])
