"""The layout of the compiled kernels: nodes first and images last in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dnw_graph._compat import functorch_active, in_forward_mode, is_in_torch_dispatch_mode
from dnw_graph.ops.build import kernels
from dnw_graph.ops.call import readable, run

DTYPES = (torch.float32, torch.float64)


def batch_last(z: Tensor) -> Tensor:
    """Return z, with nodes in dimension 1, in the memory layout of the kernels: ``[nodes, *space, batch]``.

    A vector register then holds the same pixel of several images, so that small maps and borders cost nothing extra,
    and the input of a node is contiguous.
    """
    z = z.resolve_neg()
    if is_batch_last(z):
        return z
    if z.dim() > 2 and z.movedim(1, -1).is_contiguous() and plain_eager() and kernels_take(z) and kernels() is not None:
        return _FromNodesLast.apply(z)
    return z.movedim(0, -1).contiguous().movedim(-1, 0)


def is_batch_last(z: Tensor) -> bool:
    """Return whether z has the layout of :func:`batch_last`."""
    return z.movedim(0, -1).is_contiguous()


def kernels_take(z: Tensor) -> bool:
    """Return whether the kernels can read z."""
    return z.dtype in DTYPES and readable(z)


def plain_eager() -> bool:
    """Return True in plain eager mode, where opaque kernels are safe."""
    return not (traced() or is_in_torch_dispatch_mode() or in_forward_mode())


def traced() -> bool:
    """Return whether a compiler, ``torch.jit`` or a ``torch.func`` transform intercepts operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed()


def transformed() -> bool:
    """Return whether a ``torch.func`` transform, such as ``vmap``, is active, and no compiler."""
    return not torch.compiler.is_compiling() and functorch_active()


class _FromNodesLast(torch.autograd.Function):
    """Converts channels-last maps to images last, several times as fast as PyTorch's copy."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return detach_view(_exchanged(z.movedim(1, -1)).movedim(-1, 0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].movedim(0, -1)
        if torch.is_grad_enabled() or not grad.is_contiguous() or not kernels_take(grad):
            return grads[0]
        return _exchanged(grad).movedim(-1, 1)


def detach_view(made: Tensor) -> Tensor:
    """Detach a freshly created tensor from view tracking, so that callers may modify it in place.

    Otherwise PyTorch treats a tensor permuted in the forward pass of a Function as a view, and refuses to modify it.
    """
    return made.data


def _exchanged(z: Tensor) -> Tensor:
    """Return a contiguous tensor with its first and last dimensions exchanged."""
    first, *middle, last = z.shape
    out = z.new_empty(last, *middle, first)
    flat = first, math.prod(middle), last
    if run("exchanged", flat, z.view(flat), out.view(flat[::-1])):
        return out
    return z.transpose(0, -1).contiguous()
