"""Checks of the operators' arguments: tensors must fit together, and edges lie within bounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dnw_graph._compat import is_batched
from dnw_graph.arguments import wrong
from dnw_graph.errors import InputError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def check_tensors(**given: object) -> None:
    """Refuse anything but tensors in one line; operators would need many."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise wrong(name, "a tensor", value)


def check_csr(rowptr: Tensor, columns: Tensor, values: Tensor) -> None:
    """Refuse a CSR matrix whose tensors do not fit together."""
    if rowptr.dim() != 1 or not rowptr.size(0) or columns.dim() != 1 or columns.shape != values.shape:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (rowptr, columns, values))
        raise InputError(f"expected rowptr [targets + 1], columns [edges] and values [edges]; got {shapes}")
    check_memory(rowptr.shape, columns.shape)


def check_types(numbers: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """Refuse tensors of several dtypes or devices, and sparse tensors."""
    found = {tensor.dtype for tensor in numbers}
    if len(found) > 1 or not found <= set(FLOATS):
        raise InputError(f"states and weights must share one dtype of {_names(FLOATS)}; got {_names(found)}")
    found = {tensor.dtype for tensor in indices}
    if len(found) > 1 or not found <= set(INTEGERS):
        raise InputError(f"rowptr and columns must share one dtype of {_names(INTEGERS)}; got {_names(found)}")
    if any(tensor.layout is not torch.strided for tensor in (*numbers, *indices)):
        raise InputError("all tensors must be dense; got a sparse PyTorch tensor: give tensor.to_dense()")
    devices = {tensor.device for tensor in (*numbers, *indices)}
    if len(devices) > 1:
        raise InputError(f"all tensors must be on one device; got {_names(devices)}")


def check_memory(*shapes: Iterable[int | torch.SymInt]) -> None:
    """Refuse tensors too large to be addressed."""
    for shape in shapes:
        sizes = [size for size in shape if isinstance(size, int) and size]
        if math.prod(sizes) >= 2**47:
            raise InputError(f"a tensor of shape {list(shape)} does not fit in memory")


def check_pointers(rowptr: Tensor, columns: Tensor) -> None:
    """Refuse row pointers that do not ascend from 0 to the number of edges."""
    if not (rowptr[0] == 0) & (rowptr[-1] == len(columns)) & (rowptr.diff() >= 0).all():
        raise wrong_edges()


def check_sources(columns: Tensor, lowest: int, highest: int) -> None:
    """Refuse sources outside lowest … highest - 1."""
    if not ((columns >= lowest) & (columns < highest)).all():
        raise wrong_edges()


def batched(grad: Tensor | None) -> bool:
    """Return whether a gradient is batched by ``torch.func.vmap`` or ``is_grads_batched``."""
    return grad is not None and is_batched(grad)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward of a Function refuse double backward and vectorised gradients.

    PyTorch's ``once_differentiable`` does not refuse them if the incoming gradient is a constant.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise InputError("these gradients cannot be differentiated (create_graph=True); use propagation='block'")
        if any(map(batched, grads)):
            raise InputError("these gradients cannot be computed for several outputs at once; use propagation='block'")
        return backward(ctx, *grads)

    return checked


def wrong_edges() -> InputError:
    """Return the error for edges out of bounds."""
    return InputError(
        "rowptr must ascend from 0 to the number of edges, and columns must be valid sources; got other values"
    )


def is_half(tensor: Tensor) -> bool:
    """Return whether a tensor has half precision; sums are then computed in float32 and rounded at the end."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _names(found: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, found)))
