"""Linear layers and convolutions over their real weights alone, as registered operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dnw_graph.errors import InputError
from dnw_graph.ops.build import kernels
from dnw_graph.ops.call import bind, readable, run
from dnw_graph.ops.csr import by_source, targets_of
from dnw_graph.ops.layout import detach_view, kernels_take, plain_eager
from dnw_graph.ops.operands import (
    batched,
    check_csr,
    check_memory,
    check_pointers,
    check_sources,
    check_tensors,
    check_types,
    is_half,
)

LARGEST = 4096  # Upper bound of kernel size, stride, padding and dilation.


def sparse_linear(
    x: Float[Tensor, "*batch inputs"],
    rowptr: Int[Tensor, " rows"],
    columns: Int[Tensor, " weights"],
    values: Float[Tensor, " weights"],
    bias: Float[Tensor, " outputs"] | None = None,
    relu: bool = False,
) -> Float[Tensor, "*batch outputs"]:
    r"""Return :math:`y_v = b_v + \sum_{(u,v) \in E} w_{uv} x_u`, a linear layer over its real weights.

    The operator ``dnw_graph::sparse_linear`` of ordinary tensors; ``x``, ``values`` and ``bias`` get gradients. Half
    precisions are computed in float32 and rounded once.

    Args:
        x: Inputs, channels last.
        rowptr: Where the weights of each output start, and one past the last weight: ``[outputs + 1]``, ascending from
            0.
        columns: Input of each weight, int32 or int64 like ``rowptr``.
        values: The weights.
        bias: b.
        relu: Return relu(y).

    Raises:
        InputError: If shapes, dtypes or devices do not fit, or an index is out of range.
    """
    check_tensors(x=x, rowptr=rowptr, columns=columns, values=values, **({} if bias is None else {"bias": bias}))
    call = _linear if plain_call(x, values, bias) else _sparse_linear
    return call(x, rowptr, columns, values, bias, relu)


class Turned(NamedTuple):
    """Edges in CSR by input.

    Attributes:
        rowptr: Where the edges of each input start.
        columns: Output of each edge.
        order: The index of each edge in the order by output.
    """

    rowptr: Int[Tensor, " inputs_and_one"]
    columns: Int[Tensor, " weights"]
    order: Int[Tensor, " weights"]


def turned(rowptr: Int[Tensor, " rows"], columns: Int[Tensor, " weights"], inputs: int) -> Turned:
    """Return edges by input.

    Raises:
        InputError: If an index is out of range.
    """
    starts, order = by_source(rowptr.contiguous(), columns.contiguous(), inputs)
    return Turned(starts, targets_of(rowptr, columns).index_select(0, order), order)


def trained_linear(
    x: Float[Tensor, "*batch inputs"],
    rowptr: Int[Tensor, " rows"],
    columns: Int[Tensor, " weights"],
    values: Float[Tensor, " weights"],
    bias: Float[Tensor, " outputs"] | None,
    by_input: Callable[[], Turned],
) -> Float[Tensor, "*batch outputs"]:
    """Return :func:`sparse_linear` of edges that stay for many steps, in plain eager mode.

    Args:
        x: Inputs, channels last.
        rowptr: As in :func:`sparse_linear`.
        columns: Input of each weight.
        values: The weights.
        bias: What is added to the outputs.
        by_input: Returns the same edges turned; called in a backward pass that needs them.
    """
    return _TrainedLinear.apply(x, values, bias, (rowptr, columns), by_input)


class _TrainedLinear(torch.autograd.Function):
    """The layer with edges that are turned once for many backward passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        csr: tuple[Tensor, Tensor],
        by_input: Callable[[], Turned],
    ) -> Tensor:
        ctx.csr, ctx.by_input = csr, by_input
        ctx.save_for_backward(x, values)
        return detach_view(_linear(x, *csr, values, bias, False))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        return *_linear_grads(grads[0], x, ctx.csr, values, ctx.needs_input_grad[:3], ctx.by_input), None, None


def sparse_conv2d(
    x: Float[Tensor, "batch inputs height width"],
    rowptr: Int[Tensor, " rows"],
    columns: Int[Tensor, " weights"],
    values: Float[Tensor, " weights"],
    bias: Float[Tensor, " outputs"] | None = None,
    *,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    add: Float[Tensor, "batch outputs h w"] | None = None,
    relu: bool = False,
) -> Float[Tensor, "batch outputs h w"]:
    r"""Return a 2-dimensional convolution over its real weights.

    .. math:: y_v(i, j) = b_v + \textstyle\sum_{(u, k, l, v) \in E} w_{uklv}\, x_u(i', j')

    with :math:`i' = s i + d k - p` and :math:`j' = s j + d l - p`.

    The operator ``dnw_graph::sparse_convolution`` of ordinary tensors; ``x``, ``values``, ``bias`` and ``add`` get
    gradients. Half precisions are computed in float32 and rounded once.

    Args:
        x: Inputs.
        rowptr: Where the weights of each output channel start, and one past the last one: ``[outputs + 1]``.
        columns: Index of each weight in the flattened kernel of its output channel, (u · height + k) · width + l with u
            counted within the group, int32 or int64 like ``rowptr``.
        values: The weights.
        bias: b.
        kernel: Height and width of the kernel.
        stride: s; two numbers, as in ``torch.nn.functional.conv2d``, like padding and dilation.
        padding: p.
        dilation: d.
        groups: Number of groups.
        add: A tensor to add to the result.
        relu: Return relu(y + add).

    Raises:
        InputError: If shapes, dtypes or devices do not fit, or an index is out of range.
    """
    optional = {name: each for name, each in (("bias", bias), ("add", add)) if each is not None}
    check_tensors(x=x, rowptr=rowptr, columns=columns, values=values, **optional)
    window = [*kernel, *stride, *padding, *dilation]
    call = _convolution if plain_call(x, values, bias, add) else _sparse_convolution
    return call(x, rowptr, columns, values, bias, add, window, groups, relu)


def plain_call(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the kernel can be called directly: dispatching an operator takes longer than a small layer."""
    if not plain_eager() or torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
        return False
    return not (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *others)))


def _rows(x: Tensor) -> Tensor:
    """Return vectors as the rows of a matrix, which may have no columns."""
    return x.reshape(math.prod(x.shape[:-1]), x.size(-1))


def _linear(x: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    shape = _check_linear(x, rowptr, columns, values, bias)
    if is_half(x):
        return _in_float32(_linear, [x, values, bias], lambda x, w, b: (x, rowptr, columns, w, b, relu))
    rowptr, columns, values = rowptr.contiguous(), columns.contiguous(), values.contiguous()
    bias = None if bias is None else bias.contiguous()
    if x.device.type == "cpu":
        rows = _rows(x).contiguous()
        out = x.new_empty(len(rows), shape[-1])
        numbers = (len(rows), x.size(-1), out.size(1), len(columns), int(relu))
        if run("sparse_linear", numbers, rows, rowptr, columns, values, bias, out):
            return out.view(shape)
    out = F.linear(x, dense_weight(rowptr, columns, values, x.size(-1)), bias)
    return out.relu() if relu else out


class LinearCall:
    """Calls the kernel of :func:`sparse_linear` many times with the same weights, whose shapes are checked once.

    The kernel reads the weights where they lie and checks their indices every time.

    Args:
        tensors: Row pointers, columns, values and bias of the layer.
        inputs: Number of inputs.
        relu: Whether a ReLU follows.
    """

    def __init__(self, tensors: Sequence[Tensor | None], inputs: int, relu: bool) -> None:
        rowptr, columns, values, bias = tensors
        assert rowptr is not None
        assert columns is not None
        assert values is not None
        self._tensors, self._inputs, self._outputs = list(tensors), inputs, len(rowptr) - 1
        self._dtype = values.dtype
        self._places = self._where(tensors)
        x, out = values.new_empty(1, inputs), values.new_empty(1, self._outputs)
        _check_linear(x, rowptr, columns, values, bias)
        numbers = (1, inputs, self._outputs, len(columns), int(relu))
        self._kernel = bind("sparse_linear", numbers, x, *tensors, out)

    def fits(self, tensors: Sequence[Tensor | None]) -> bool:
        """Return whether these are the tensors of the layer, in the same places of memory."""
        same = all(a is b for a, b in zip(tensors, self._tensors, strict=True))
        return same and self._where(tensors) == self._places

    def __call__(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"] | None:
        """Return the layer's outputs, or None if the kernel cannot read this tensor.

        Raises:
            InputError: If an index is out of range.
        """
        fitting = readable(x) and x.dtype is self._dtype and x.dim() > 0 and x.size(-1) == self._inputs
        if self._kernel is None or not fitting or not x.numel() or not x.is_contiguous():
            return None
        out = x.new_empty(*x.shape[:-1], self._outputs)
        self._kernel({0: x.numel() // self._inputs}, {0: x.data_ptr(), 5: out.data_ptr()})
        return out

    @staticmethod
    def _where(tensors: Sequence[Tensor | None]) -> list[tuple[int, int] | None]:
        return [None if each is None else (each.data_ptr(), each.numel()) for each in tensors]


_sparse_linear = torch.library.custom_op(
    "dnw_graph::sparse_linear",
    _linear,
    mutates_args=(),
    schema="(Tensor x, Tensor rowptr, Tensor columns, Tensor values, Tensor? bias, bool relu) -> Tensor",
)


@_sparse_linear.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(_check_linear(x, *others[:-1]))


def _convolution(
    x: Tensor,
    rowptr: Tensor,
    columns: Tensor,
    values: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    window: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    shape = _check_convolution(x, rowptr, columns, values, bias, add, window, groups)
    if is_half(x):
        return _in_float32(
            _convolution,
            [x, values, bias, add],
            lambda x, w, b, a: (x, rowptr, columns, w, b, a, window, groups, relu),
        )
    tensors = [None if each is None else each.contiguous() for each in (rowptr, columns, values, bias, add)]
    if x.device.type == "cpu":
        out = x.new_empty(shape)
        numbers = (*x.shape[:2], shape[1], len(columns), groups, int(relu), x.shape[2:], shape[2:], list(window))
        if run("sparse_convolution", numbers, x.contiguous(), *tensors, out):
            return out
    kernel, stride, padding, dilation = _parts(window)
    channels = x.size(1) // groups
    weight = dense_weight(rowptr, columns, values, channels * math.prod(kernel))
    out = F.conv2d(x, weight.view(-1, channels, *kernel), bias, stride, padding, dilation, groups)
    out = out if add is None else out + add
    return out.relu() if relu else out


_sparse_convolution = torch.library.custom_op(
    "dnw_graph::sparse_convolution",
    _convolution,
    mutates_args=(),
    schema="(Tensor x, Tensor rowptr, Tensor columns, Tensor values, Tensor? bias, Tensor? add, int[] window, "
    "int groups, bool relu) -> Tensor",
)


@_sparse_convolution.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(_check_convolution(x, *others[:-1]))


def dense_weight(rowptr: Tensor, columns: Tensor, values: Tensor, sources: int) -> Tensor:
    """Return a dense weight ``[outputs, sources]``; weights with the same index are summed.

    Raises:
        InputError: If an index is out of range.
    """
    check_pointers(rowptr, columns)
    check_sources(columns, 0, sources)
    check_memory((len(rowptr) - 1, sources))
    dense = values.new_zeros(len(rowptr) - 1, sources)
    return dense.index_put((targets_of(rowptr, columns).long(), columns.long()), values, accumulate=True)


def _parts(window: Sequence[int]) -> tuple[list[int], ...]:
    """Return kernel, stride, padding and dilation."""
    return tuple(list(window[n : n + 2]) for n in range(0, 8, 2))


def _in_float32(operator: Any, numbers: Sequence[Tensor | None], arguments: Any) -> Tensor:
    found = operator(*arguments(*(None if number is None else number.float() for number in numbers)))
    (first, *_) = numbers
    assert isinstance(found, Tensor)
    assert isinstance(first, Tensor)
    return found.to(first.dtype)


def _check_linear(
    x: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[int | torch.SymInt, ...]:
    """Refuse what does not fit together; return the shape of the result."""
    check_csr(rowptr, columns, values)
    check_types((x, values) if bias is None else (x, values, bias), (rowptr, columns))
    if not x.dim():
        raise InputError("expected inputs of shape [*batch, inputs]; got a number")
    outputs = rowptr.size(0) - 1
    _check_bias(bias, outputs)
    shape = (*x.shape[:-1], outputs)
    check_memory(x.shape, shape)
    return shape


def _check_convolution(
    x: Tensor,
    rowptr: Tensor,
    columns: Tensor,
    values: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    window: Sequence[int],
    groups: int,
) -> tuple[int | torch.SymInt, ...]:
    """Refuse what does not fit together; return the shape of the result."""
    check_csr(rowptr, columns, values)
    check_types([each for each in (x, values, bias, add) if each is not None], (rowptr, columns))
    if x.dim() != 4:
        raise InputError(f"expected inputs of shape [batch, inputs, height, width]; got {list(x.shape)}")
    least = [1, 1, 1, 1, 0, 0, 1, 1]
    if len(window) != 8 or not all(low <= each <= LARGEST for low, each in zip(least, window, strict=True)):
        raise InputError(
            f"kernel, stride, padding and dilation must be two numbers each, from 1 (padding: 0) to {LARGEST}; "
            f"got {list(window)}"
        )
    outputs = rowptr.size(0) - 1
    if groups < 1 or x.size(1) < 1 or outputs < 1 or x.size(1) % groups or outputs % groups:
        raise InputError(f"{x.size(1)} input and {outputs} output channels are not {groups} groups")
    _check_bias(bias, outputs)
    sides = sides_after(x, window)
    if not (sides[0] >= 1 and sides[1] >= 1 and x.size(2) >= 1 and x.size(3) >= 1):
        raise InputError(f"maps of {list(x.shape[2:])} are too small for kernel, padding and dilation {list(window)}")
    shape = (x.size(0), outputs, *sides)
    if add is not None and tuple(add.shape) != shape:
        raise InputError(f"add must have the shape of the result, {list(shape)}; got {list(add.shape)}")
    check_memory(x.shape, shape)
    return shape


def sides_after(x: Tensor, window: Sequence[int]) -> list[int | torch.SymInt]:
    """Return height and width of the result of a convolution; ``window`` is kernel, stride, padding and dilation."""
    return [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(x.shape[2:], *_parts(window), strict=True)
    ]


def _check_bias(bias: Tensor | None, outputs: int) -> None:
    if bias is not None and bias.shape != (outputs,):
        raise InputError(f"{outputs} outputs need a bias each; got {list(bias.shape)}")


@torch.library.custom_op(
    "dnw_graph::sparse_linear_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor rowptr, Tensor columns, Tensor values, bool of_x, bool of_values) "
    "-> (Tensor, Tensor)",
)
def _linear_grad(
    grad: Tensor, x: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor, of_x: bool, of_values: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of inputs and of weights; an empty tensor for one that is not requested."""
    _check_linear(x, rowptr, columns, values, None)
    if is_half(x):
        single = grad.float(), x.float(), rowptr, columns, values.float(), of_x, of_values
        return _rounded(_linear_grad(*single), x.dtype)
    csr = rowptr, columns
    found = _linear_kernels(grad, x, csr, values, lambda: turned(*csr, x.size(-1)), of_x, of_values)
    if found is not None:
        return found
    return _linear_formula(grad, x, dense_weight(*csr, values, x.size(-1)), csr, of_x, of_values)


def _linear_kernels(
    grad: Tensor,
    x: Tensor,
    csr: tuple[Tensor, Tensor],
    values: Tensor,
    by_input: Callable[[], Turned],
    of_x: bool,
    of_values: bool,
) -> tuple[Tensor, Tensor] | None:
    """Return the same by the kernels; None if they do not take the tensors."""
    if kernels() is None or not (kernels_take(grad) and kernels_take(x) and kernels_take(values)):
        return None
    csr = csr[0].contiguous(), csr[1].contiguous()
    received, sent = (_rows(each).contiguous() for each in (grad, x))
    (batch, outputs), inputs, x_grad, values_grad = received.shape, sent.size(1), x.new_empty(0), x.new_empty(0)
    if of_values:
        # The rows of the longer side take turns, and those of the shorter one stay in cache.
        values_grad = torch.empty_like(values, memory_format=torch.contiguous_format)
        if inputs > outputs:
            numbers = (batch, outputs, inputs, len(values))
            done = run("sampled_linear", numbers, sent, received, *by_input(), values_grad)
        else:
            numbers = (batch, inputs, outputs, len(values))
            done = run("sampled_linear", numbers, received, sent, *csr, None, values_grad)
        if not done:
            return None
    if of_x:
        rowptr, columns, order = by_input()
        x_grad = _linear(received, rowptr, columns, values.index_select(0, order), None, False).view(x.shape)
    return x_grad, values_grad


def _linear_formula(
    grad: Tensor, x: Tensor, weight: Tensor, csr: tuple[Tensor, Tensor], of_x: bool, of_values: bool
) -> tuple[Tensor, Tensor]:
    """Return the same by PyTorch's operations, which can be differentiated."""
    x_grad = grad @ weight if of_x else None
    if not of_values:
        return _or_empty(x_grad, x), x.new_empty(0)
    weight_grad = _rows(grad).t() @ _rows(x)
    return _or_empty(x_grad, x), weight_grad[targets_of(*csr).long(), csr[1].long()]


@_linear_grad.register_fake
def _sizes_of_grads(
    grad: Tensor, x: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    of_x, of_values = others[-2:]
    return x.new_empty(x.shape if of_x else 0), x.new_empty(values.shape if of_values else 0)


@torch.library.custom_op(
    "dnw_graph::sparse_convolution_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor rowptr, Tensor columns, Tensor values, int[] window, int groups, "
    "bool of_x, bool of_values) -> (Tensor, Tensor)",
)
def _convolution_grad(
    grad: Tensor,
    x: Tensor,
    rowptr: Tensor,
    columns: Tensor,
    values: Tensor,
    window: Sequence[int],
    groups: int,
    of_x: bool,
    of_values: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of inputs and of weights; an empty tensor for one that is not requested."""
    _check_convolution(x, rowptr, columns, values, None, grad, window, groups)
    if is_half(x):
        single = grad.float(), x.float(), rowptr, columns, values.float(), window, groups, of_x, of_values
        return _rounded(_convolution_grad(*single), x.dtype)
    if x.device.type == "cpu":
        x_grad = x.new_empty(x.shape) if of_x else None
        values_grad = torch.empty_like(values) if of_values else None
        numbers = (*x.shape[:2], grad.size(1), len(columns), groups, x.shape[2:], grad.shape[2:], list(window))
        given = [each.contiguous() for each in (grad, x, rowptr, columns, values)]
        if run("sparse_convolution_grad", numbers, *given, x_grad, values_grad):
            return _or_empty(x_grad, x), _or_empty(values_grad, x)
    weight = dense_weight(rowptr, columns, values, x.size(1) // groups * math.prod(window[:2]))
    return _convolution_formula(grad, x, weight, (rowptr, columns), window, groups, of_x, of_values)


def _convolution_formula(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    csr: tuple[Tensor, Tensor],
    window: Sequence[int],
    groups: int,
    of_x: bool,
    of_values: bool,
) -> tuple[Tensor, Tensor]:
    """Return the same by PyTorch's operations, which can be differentiated."""
    kernel, stride, padding, dilation = _parts(window)
    weight = weight.view(len(weight), -1, *kernel)
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [of_x, of_values, False]
    )
    values_grad = weight_grad.flatten(1)[targets_of(*csr).long(), csr[1].long()] if of_values else None
    return _or_empty(x_grad, x), _or_empty(values_grad, x)


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


def _rounded(grads: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return grads[0].to(dtype), grads[1].to(dtype)


_convolution_grad.register_fake(_sizes_of_grads)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, relu = inputs
    ctx.save_for_backward(*tensors, output if relu else None)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, rowptr, columns, values, out = ctx.saved_tensors
    grad = grad if out is None else grad * (out > 0)
    of_x, _, _, of_values, of_bias, _ = ctx.needs_input_grad
    x_grad, values_grad, bias_grad = _linear_grads(grad, x, (rowptr, columns), values, (of_x, of_values, of_bias))
    return x_grad, None, None, values_grad, bias_grad, None


def _linear_grads(
    grad: Tensor,
    x: Tensor,
    csr: tuple[Tensor, Tensor],
    values: Tensor,
    needed: tuple[bool, ...],
    by_input: Callable[[], Turned] | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients that are needed, of inputs, weights and bias."""
    of_x, of_values, of_bias = needed
    found = None
    if torch.is_grad_enabled():  # create_graph=True
        weight = dense_weight(*csr, values, x.size(-1))
        found = _linear_formula(grad, x, weight, csr, of_x, of_values)
    elif by_input is not None and plain_eager() and not batched(grad):
        found = _linear_kernels(grad, x, csr, values, by_input, of_x, of_values)
    if found is None:
        found = _linear_grad(grad, x, *csr, values, of_x, of_values)
    bias_grad = _rows(grad).sum(0) if of_bias else None
    return found[0] if of_x else None, found[1] if of_values else None, bias_grad


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, _, ctx.window, ctx.groups, relu = inputs
    ctx.save_for_backward(*tensors, output if relu else None)


def _convolution_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, rowptr, columns, values, out = ctx.saved_tensors
    grad = grad if out is None else grad * (out > 0)
    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    if torch.is_grad_enabled():  # create_graph=True
        weight = dense_weight(rowptr, columns, values, x.size(1) // ctx.groups * math.prod(ctx.window[:2]))
        parts = (rowptr, columns), ctx.window, ctx.groups, *needed
        x_grad, values_grad = _convolution_formula(grad, x, weight, *parts)
    else:
        x_grad, values_grad = _convolution_grad(grad, x, rowptr, columns, values, ctx.window, ctx.groups, *needed)
    bias_grad = grad.sum((0, 2, 3)) if ctx.needs_input_grad[4] else None
    add_grad = grad if ctx.needs_input_grad[5] else None
    grads = x_grad if needed[0] else None, values_grad if needed[1] else None
    return grads[0], None, None, grads[1], bias_grad, add_grad, None, None, None


_sparse_linear.register_autograd(_linear_backward, setup_context=_save_linear)
_sparse_convolution.register_autograd(_convolution_backward, setup_context=_save_convolution)
for _device in ("cpu", "cuda"):  # Under autocast always in float32.
    torch.library.register_autocast("dnw_graph::sparse_linear", _device, torch.float32)
    torch.library.register_autocast("dnw_graph::sparse_convolution", _device, torch.float32)
