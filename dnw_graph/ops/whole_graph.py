"""A whole static graph for inference as one operator: sparse product, scale and shift, ReLU, depthwise convolution."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from dnw_graph.arguments import check, wrong
from dnw_graph.errors import InputError
from dnw_graph.ops.csr import product
from dnw_graph.ops.operands import check_csr, check_memory, check_pointers, check_tensors, check_types, is_half
from dnw_graph.ops.static_plan import GraphTensors, StaticPlan

STATE_DTYPES = (None, torch.bfloat16, torch.int8)


def static_graph(
    x: Float[Tensor, "batch inputs height width"],
    sizes: Sequence[int],
    strides: Sequence[int],
    rowptr: Int[Tensor, " rows"],
    columns: Int[Tensor, " edges"],
    values: Float[Tensor, " edges"],
    scale: Float[Tensor, " functions"],
    shift: Float[Tensor, " functions"],
    kernel: Float[Tensor, "functions 3 3"],
    bias: Float[Tensor, " functions"] | None = None,
    state_dtype: torch.dtype | None = None,
    state_scale: Float[Tensor, " nodes"] | None = None,
) -> Float[Tensor, "batch outputs h w"]:
    r"""Compute a static graph for inference, block by block, and return the states of its last block.

    .. math:: I_v = \sum_{(u,v) \in E} w_{uv} Z_u

    .. math:: Z_v = k_v * \mathrm{relu}(a_v I_v + b_v)

    with a 3×3 kernel k_v, zero padding of 1, and for the nodes of the first block I_v = x_v. With a ``bias`` c_v the
    state is relu(k_v * relu(a_v I_v + b_v) + c_v). The operator ``dnw_graph::static_graph`` of ordinary tensors,
    without gradients. Half precisions are computed in float32 throughout, and the outputs rounded.

    Nodes are numbered block by block. A block with stride 2 halves the maps' sides (rounded up); later blocks can only
    have edges from that block and later ones. In this way several stages become one graph: the outputs of a stage and
    the inputs of the next one are one block with stride 2.

    Args:
        x: Inputs of the nodes of the first block.
        sizes: Number of nodes of each block.
        strides: Stride of the node function in each block, 1 or 2; 0 for a block without a node function, Z = I.
        rowptr: Where the edges of each node after the first block start, and one past the last edge:
            ``[nodes − inputs + 1]``.
        columns: Source node of each edge, counted from the first input, int32 or int64 like ``rowptr``.
        values: Weight of each edge.
        scale: a_v for every node with a node function, in the order of the nodes.
        shift: b_v, likewise.
        kernel: k_v, likewise.
        bias: c_v, likewise, for a second norm and ReLU after the convolution.
        state_dtype: ``torch.bfloat16``: states are rounded to it before they are sent, sums are not. ``torch.int8``:
            states are rounded to s_v · {−127, …, 127}, NaN to any of them; in the CPU kernel, weights and sums of nodes
            with up to 1,024 edges are 16-bit integers that cannot overflow. Default: no rounding.
        state_scale: s_v > 0 for every node, with ``torch.int8``.

    Raises:
        InputError: If shapes, dtypes or devices do not fit, or an edge does not lead from an earlier block with maps of
            the same size.
    """
    check_tensors(x=x, rowptr=rowptr, columns=columns, values=values, scale=scale, shift=shift, kernel=kernel)
    for name, tensor in (("bias", bias), ("state_scale", state_scale)):
        if tensor is not None:
            check_tensors(**{name: tensor})
    sizes, strides = (check(name, each, Sequence[int]) for name, each in (("sizes", sizes), ("strides", strides)))
    graph = (rowptr, columns, values, scale, shift, kernel, bias)
    return _static_graph(x, list(sizes), list(strides), *graph, state_dtype, state_scale)


@torch.library.custom_op(
    "dnw_graph::static_graph",
    mutates_args=(),
    schema="(Tensor x, int[] sizes, int[] strides, Tensor rowptr, Tensor columns, Tensor values, Tensor scale, "
    "Tensor shift, Tensor kernel, Tensor? bias, ScalarType? state_dtype=None, Tensor? state_scale=None) -> Tensor",
)
def _static_graph(
    x: Tensor,
    sizes: list[int],
    strides: list[int],
    rowptr: Tensor,
    columns: Tensor,
    values: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    state_dtype: torch.dtype | None = None,
    state_scale: Tensor | None = None,
) -> Tensor:
    graph = GraphTensors(rowptr, columns, values, scale, shift, kernel, bias, state_scale)
    _check(x, sizes, strides, graph, state_dtype)
    dtype = x.dtype
    x, graph = _ready(x), GraphTensors(*map(_ready, graph))
    plan = StaticPlan.make(sizes, strides, graph, state_dtype) if x.device.type == "cpu" else None
    out = None if plan is None else plan(x)
    return (_plain(x, sizes, strides, graph, state_dtype) if out is None else out).to(dtype)


@_static_graph.register_fake
def _(x: Tensor, sizes: list[int], strides: list[int], *given: Any) -> Tensor:
    state_dtype = given[7] if len(given) > 7 else None
    _check(x, sizes, strides, GraphTensors(*given[:7], *given[8:]), state_dtype)
    return x.new_empty(_output_shape(x, sizes, strides))


def _ready(tensor: Any) -> Any:
    """Return a tensor that is contiguous, and not in half precision; None as it is."""
    return None if tensor is None else (tensor.float() if is_half(tensor) else tensor).contiguous()


for _device in ("cpu", "cuda"):  # Under autocast always in float32.
    torch.library.register_autocast("dnw_graph::static_graph", _device, torch.float32)


def _check(
    x: Tensor, sizes: list[int], strides: list[int], graph: GraphTensors, state_dtype: torch.dtype | None
) -> None:
    rowptr, columns, values, scale, shift, kernel, bias, state_scale = graph
    if state_dtype not in STATE_DTYPES:
        raise wrong("state_dtype", "torch.bfloat16, torch.int8 or None", state_dtype)
    if (state_dtype is torch.int8) != (state_scale is not None):
        raise InputError("state_scale is for state_dtype=torch.int8 only")
    if not sizes or len(sizes) != len(strides) or min(sizes) < 0 or not set(strides) <= {0, 1, 2}:
        raise InputError(f"every block needs a size and a stride of 0, 1 or 2; got sizes {sizes}, strides {strides}")
    if x.dim() != 4 or x.size(1) != sizes[0] or x.size(2) < 1 or x.size(3) < 1:
        raise InputError(f"expected an input of shape [batch, {sizes[0]}, height, width]; got {list(x.shape)}")
    check_csr(rowptr, columns, values)
    if rowptr.size(0) != sum(sizes[1:]) + 1:
        raise InputError(f"{sum(sizes[1:])} nodes after the inputs need one more row pointer; got {rowptr.size(0)}")
    functions = sum(size for size, stride in zip(sizes, strides, strict=True) if stride)
    vectors = (scale, shift) if bias is None else (scale, shift, bias)
    for tensor, shape in (*((vector, (functions,)) for vector in vectors), (kernel, (functions, 3, 3))):
        if tensor.shape != shape:
            raise InputError(
                f"{functions} node functions need scale, shift and bias of shape [{functions}] and kernel "
                f"[{functions}, 3, 3]; got {list(tensor.shape)}"
            )
    if state_scale is not None:
        if state_scale.shape != (sum(sizes),):
            raise InputError(f"{sum(sizes)} nodes need a state_scale each; got {list(state_scale.shape)}")
        vectors = (*vectors, state_scale)
    check_types((x, values, *vectors, kernel), (rowptr, columns))
    # All states with their borders, for at least one image.
    check_memory((x.size(0), 2 * (sum(sizes) + 1), x.size(2) + 2, x.size(3) + 2))


def _output_shape(x: Tensor, sizes: list[int], strides: list[int]) -> tuple[int | torch.SymInt, ...]:
    height, width = x.shape[2:]
    for _ in range(strides.count(2)):
        height, width = (height + 1) // 2, (width + 1) // 2
    return x.size(0), sizes[-1], height, width


def _plain(
    x: Tensor, sizes: list[int], strides: list[int], graph: GraphTensors, state_dtype: torch.dtype | None
) -> Tensor:
    """Compute the graph with PyTorch's operations, on any device."""
    received = deque(_states(x, sizes, strides, graph, state_dtype), maxlen=1).pop()
    # Always a copy: an operator must not return its input.
    return received.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def largest_states(
    x: Float[Tensor, "batch inputs height width"], sizes: Sequence[int], strides: Sequence[int], graph: GraphTensors
) -> Float[Tensor, " nodes"]:
    """Return the largest magnitude of each node's state, for the nodes of all blocks."""
    states = _states(x, list(sizes), list(strides), graph, None)
    return torch.cat([state.flatten(1).abs().amax(1) if len(state) else state.new_empty(0) for state in states])


def _states(
    x: Tensor, sizes: list[int], strides: list[int], graph: GraphTensors, state_dtype: torch.dtype | None
) -> Iterator[Tensor]:
    """Compute the states of each block, node-major, before they are rounded."""
    rowptr, columns, values, scale, shift, kernel, bias, state_scale = graph
    check_pointers(rowptr, columns)
    states: list[Tensor] = []  # Node-major.
    first = start = done = 0  # First node with maps of this size, first node of the block, node functions before it.
    received = x.transpose(0, 1)
    for size, stride in zip(sizes, strides, strict=True):
        if states:
            z = torch.cat(states)
            rows = rowptr[start - sizes[0] : start - sizes[0] + size + 1]
            edges = slice(int(rows[0]), int(rows[-1]))
            received = product(z.flatten(1), rows - rows[0], columns[edges] - first, values[edges])
            received = received.view(size, *z.shape[1:])
        if stride == 2:
            states, first = [], start
        if stride and not size:
            received = received[..., ::stride, ::stride]
        elif stride:
            own = slice(done, done + size)
            affine = torch.addcmul(shift[own].view(-1, 1, 1, 1), scale[own].view(-1, 1, 1, 1), received)
            z = F.conv2d(affine.relu().transpose(0, 1), kernel[own].unsqueeze(1), None, stride, 1, groups=size)
            z = z if bias is None else (z + bias[own].view(-1, 1, 1)).relu()
            received = z.transpose(0, 1)
            done += size
        yield received
        if state_dtype is torch.int8:
            assert state_scale is not None
            unit = state_scale[start : start + size].view(-1, 1, 1, 1)
            received = unit * (received / unit).round().clamp(-127, 127)
        elif state_dtype is not None:
            received = received.to(state_dtype).to(received.dtype)
        states.append(received)
        start += size
