"""The dense product for the gradient of all candidates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dnw_graph._compat import has_bfloat16_products, one_dnn_linear
from dnw_graph.ops.call import readable
from dnw_graph.ops.layout import plain_eager


def product_with_transpose(
    a: Float[Tensor, "m k"], b: Float[Tensor, "n k"], out: Float[Tensor, "m n"] | None = None
) -> Float[Tensor, "m n"]:
    """Return a bᵀ of contiguous matrices.

    In float32 on a CPU with AVX-512, oneDNN computes it: MKL, the library behind ``torch.mm``, uses only half of the
    vector width of non-Intel processors (AMD EPYC, AVX-512: 200 against 430 GFLOP/s on 2 cores). With only AVX2, MKL is
    faster (AMD EPYC: 79 against 67 GFLOP/s on one core).

    In bfloat16, sums are float32 and the result is rounded to bfloat16, also on processors without such products.

    Args:
        a: First matrix.
        b: Second matrix.
        out: Tensor for the result; its rows may be strided, as in a part of a larger matrix.
    """
    if a.dtype == torch.bfloat16 and a.is_cpu and not has_bfloat16_products():
        result = product_with_transpose(a.float(), b.float()).to(a.dtype)
    elif _one_dnn_is_faster(a, b):
        one_dnn = one_dnn_linear()
        assert one_dnn is not None
        result = one_dnn(a, b, None, "none", [], "")
    else:
        result = a @ b.t() if out is None or a.dtype != out.dtype else torch.mm(a, b.t(), out=out)
    return result if out is None or result is out else out.copy_(result)


def _one_dnn_is_faster(a: Tensor, b: Tensor) -> bool:
    if one_dnn_linear() is None or not torch.backends.mkldnn.is_available() or not plain_eager():
        return False
    mkl = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
    types = (torch.bfloat16,) if mkl else (torch.float32, torch.bfloat16)
    return all(readable(t) and t.dtype in types and t.dim() == 2 and t.numel() for t in (a, b))
