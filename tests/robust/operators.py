"""Operators and node functions, called in every way in which memory could be misread, beside plain PyTorch.

A case is bad if its numbers are not those of plain PyTorch, if it gives numbers where plain PyTorch has none, if good
input is refused, or if an operator ends in a raw error. A node function may end in PyTorch's own where its layers do.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from fuzz import Bad, Case
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dnw_graph import InputError, NeuralGraph
from dnw_graph.node_functions import NormReluConv, NormReluConvNormRelu, ReluConvSendNorm
from dnw_graph.ops import sparse_conv2d, sparse_linear, sparse_product, static_graph
from dnw_graph.ops.dense import product_with_transpose
from dnw_graph.ops.layout import batch_last
from dnw_graph.selection import select_top_k

HUGE = (2**31, 2**32 + 1, 2**59, 2**61, 2**62, 2**63 - 1)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST = 2**40  # Values that one stands for, where no memory holds them.
LARGE = 1e6  # Of larger ones float32 has no digits left for what they were computed from.
TOLERANCE = {torch.float32: 3e-3, torch.float64: 1e-7, torch.bfloat16: 0.1, torch.float16: 0.1}


def cases(rng: random.Random, count: int) -> Iterator[Case]:
    """Yield so many cases, of all kinds in turn."""
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        draw = random.Random(rng.getrandbits(64))
        what, call = kind(draw)
        yield f"{kind.__name__}: {what}", functools.partial(_seeded, draw.getrandbits(32), call)


def _seeded(seed: int, call: Callable[[int], object]) -> None:
    call(seed)


def compare(
    seed: int,
    found: Callable[[], Sequence[Any]],
    expected: Callable[[], Sequence[Any]],
    may_refuse: bool,
    raw: bool,
    spreads: bool = False,
) -> None:
    """Compute in both ways with the same random numbers.

    Args:
        seed: What the random numbers are drawn from.
        found: The way to be tested.
        expected: The plain way.
        may_refuse: Whether an InputError is right even where the plain way computes something.
        raw: Whether any error is right where the plain way has one.
        spreads: Whether NaN goes further in the plain way, so that nothing is compared where it has any.
    """
    refusal: Exception | None = None
    torch.manual_seed(seed)
    try:
        right = expected()
    except Exception as error:  # Whatever PyTorch has to say.
        refusal = error
    torch.manual_seed(seed)
    try:
        results = found()
    except InputError:
        if refusal is None and not may_refuse:
            raise Bad("good input is refused") from None
        raise
    except Exception:
        if raw and refusal is not None:
            return
        raise
    if refusal is not None:
        raise Bad(f"gives numbers where PyTorch has none: {type(refusal).__name__}")
    lost = any(_lost(result, spreads) for result in right)
    for place, (a, b) in enumerate(zip(results, right, strict=True)):
        _compare(a, b, place, lost)


def _lost(result: Tensor | None, spreads: bool) -> bool:
    """Whether numbers are so large that there is nothing left of what they were computed from, or NaN that spreads."""
    if result is None or result.is_meta or result.dtype not in FLOATS or result.numel() > MOST:
        return False
    result = result.detach().to_dense()
    too_large = result.dtype != torch.float64 and bool((result.abs() > LARGE).any())
    return too_large or (spreads and bool(result.isnan().any()))


def _compare(a: Tensor | None, b: Tensor | None, place: int, lost: bool) -> None:
    if a is None or b is None:
        if a is not b:
            raise Bad(f"result {place} is there in one way only")
        return
    if a.shape != b.shape or a.dtype != b.dtype:
        raise Bad(f"result {place} has another shape or type")
    if a.is_meta or lost or a.numel() > MOST:
        return
    a, b = a.detach().to_dense(), b.detach().to_dense()
    tolerance = TOLERANCE.get(b.dtype, 0.0)
    a, b = a.double(), b.double()
    finite = b[b.isfinite()]
    tolerance *= 1 + (finite.abs().max().item() if finite.numel() else 0.0)
    if not torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True):
        raise Bad(f"result {place} differs")


# Ways to hold a tensor. Those of KEPT keep its values.


class Sub(Tensor):
    """A subclass without a behaviour of its own."""


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, t + 1], dim=-1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t


def offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape)


def negated(t: Tensor) -> Tensor:
    """The same values as a contiguous tensor whose memory holds their negatives."""
    if not t.is_floating_point() or t.dtype not in (torch.float32, torch.float64):
        return t
    memory = torch.cat([-t.detach().flatten(), t.new_zeros(2 + t.numel() % 2)])
    return torch.view_as_complex(memory.view(-1, 2)).conj().imag.as_strided(t.shape, t.contiguous().stride(), 0)


KEPT = [lambda t: t, strided, transposed, offset, negated, lambda t: t.as_subclass(Sub)]
CHANGED = [
    torch.Tensor.double,
    torch.Tensor.float,
    torch.Tensor.bfloat16,
    torch.Tensor.half,
    torch.Tensor.long,
    torch.Tensor.int,
    lambda t: t.to(torch.complex64),
    lambda t: t.to("meta"),
    lambda t: t.as_subclass(Tensor).to_sparse(),
    lambda t: torch.cat([t, t]),
    lambda t: t[1:],
    lambda t: t[:0],
    lambda t: t[:1].expand(t.shape),
    lambda t: t.unsqueeze(0),
    lambda t: t.unsqueeze(-1),
    lambda t: t.flatten(),
    lambda t: t.new_tensor(1),
    lambda t: t * torch.nan if t.is_floating_point() else t - 1,
    lambda t: t * 1e30 if t.is_floating_point() else t + 1,
    lambda t: t.flip(0),
    lambda t: t - 2**31,
    lambda t: t * 2**31,
    lambda t: t[:0].new_zeros(0, 2**62),
    lambda t: t.new_zeros(1).expand(2**61),
    lambda t: t.new_zeros(1, 1).expand(3, 2**61),
]


def _disguised(draw: random.Random, tensors: list[Any]) -> tuple[list[Any], bool]:
    """Hold some tensors in other ways; return whether all keep their values."""
    kept = True
    tensors = [draw.choice(KEPT)(t) if isinstance(t, Tensor) and draw.random() < 0.3 else t for t in tensors]
    if draw.random() < 0.4:
        place = draw.choice([n for n, t in enumerate(tensors) if isinstance(t, Tensor)])
        kept = False
        tensors[place] = draw.choice(CHANGED)(tensors[place].resolve_neg())
    return tensors, kept


def _require(condition: object) -> None:
    if not condition:
        raise ValueError("refused")


def _checked(numbers: Sequence[Tensor], rowptr: Tensor, columns: Tensor) -> None:
    """Refuse what no sparse product takes."""
    for group, types in ((numbers, FLOATS), ((rowptr, columns), (torch.int32, torch.int64))):
        _require(len({t.dtype for t in group}) == 1 and group[0].dtype in types)
    tensors = (*numbers, rowptr, columns)
    _require(all(t.layout is torch.strided for t in tensors) and len({t.device for t in tensors}) == 1)
    _require(all(t.numel() < 2**40 and not t.is_meta for t in tensors))
    _require(rowptr.dim() == columns.dim() == 1 and len(rowptr) and rowptr[0] == 0 and rowptr[-1] == len(columns))
    _require((rowptr.diff() >= 0).all())


def _csr(draw: random.Random, sources: int, targets: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    index = draw.choice([torch.int32, torch.int64])
    counts = torch.tensor([draw.randrange(sources + 2) if sources else 0 for _ in range(targets)], dtype=torch.int64)
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    columns = torch.tensor([draw.randrange(sources) for _ in range(int(counts.sum()))], dtype=index)
    return rowptr.to(index), columns, torch.randn(len(columns), dtype=torch.float64).to(dtype)


def a_sparse_product(draw: random.Random) -> Any:
    sources, targets = draw.choice([0, 1, 2, 5, 9]), draw.choice([0, 1, 3, 7])
    features, dtype = draw.choice([0, 1, 3, 4, 7, 8, 9, 16, 33, 70]), draw.choice(FLOATS[:3])
    sampled = draw.random() < 0.3
    state = draw.getrandbits(64)

    def inputs() -> tuple[list[Tensor], bool]:
        local = random.Random(state)
        z = torch.randn(sources, features, dtype=torch.float64).to(dtype)
        rowptr, columns, values = _csr(local, sources, targets, dtype)
        other = torch.randn(targets, features, dtype=torch.float64).to(dtype) if sampled else values
        (z, rowptr, columns, other), kept = _disguised(local, [z, rowptr, columns, other])
        return [z, rowptr, columns, other], kept

    def dense(z: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor) -> Tensor:
        _checked((z, values), rowptr, columns)
        _require(z.dim() == 2 and columns.shape == values.shape)
        _require(((columns >= 0) & (columns < len(z))).all())
        rows = torch.repeat_interleave(torch.arange(len(rowptr) - 1), rowptr.long().diff())
        matrix = torch.zeros(len(rowptr) - 1, len(z), dtype=torch.float64)
        matrix = matrix.index_put((rows, columns.long()), values.double(), accumulate=True)
        return (matrix @ z.double()).to(z.dtype)

    def edgewise(z: Tensor, rowptr: Tensor, columns: Tensor, received: Tensor) -> Tensor:
        _checked((z, received), rowptr, columns)
        _require(z.dim() == 2 and received.shape == (len(rowptr) - 1, z.size(1)))
        _require(((columns >= 0) & (columns < len(z))).all())
        rows = torch.repeat_interleave(torch.arange(len(rowptr) - 1), rowptr.long().diff())
        return (received.double()[rows] * z.double()[columns.long()]).sum(1).to(z.dtype)

    def sample(z: Tensor, rowptr: Tensor, columns: Tensor, received: Tensor) -> Tensor:
        return torch.ops.dnw_graph.sampled_product(received, z, rowptr, columns)

    def differentiated(function: Callable[..., Tensor]) -> Sequence[Any]:
        z, rowptr, columns, other = inputs()[0]
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in (z, other)]
        out = function(leaves[0], rowptr, columns, leaves[1])
        if not out.requires_grad or out.is_meta:
            return [out]
        return [out, *torch.autograd.grad(out, leaves, _weights(out), allow_unused=True)]

    def call(seed: int) -> None:
        ways = (sample, edgewise) if sampled else (sparse_product, dense)
        refusable = not _first(inputs, seed)[1]
        compare(seed, *(functools.partial(differentiated, way) for way in ways), may_refuse=refusable, raw=False)

    return f"{sources} → {targets}, {features} features, {dtype}, sampled={sampled}", call


def a_sparse_layer(draw: random.Random) -> Any:
    groups, dtype, linear = draw.choice([1, 1, 2, 3]), draw.choice(FLOATS[:3]), draw.random() < 0.4
    inputs_, outputs = (draw.choice([0, 1, 2, 5, 17]) * groups for _ in range(2))
    sides = [draw.choice(each) for each in ([1, 2, 3], [1, 2, 3, 7], [0, 1, 4], [1, 2, 3]) for _ in range(2)]
    kernel, stride, padding, dilation = (sides[n : n + 2] for n in range(0, 8, 2))
    if draw.random() < 0.1:
        draw.choice([kernel, stride, padding, dilation])[draw.randrange(2)] = draw.choice([-1, 0, 300, *HUGE])
    batch, maps = draw.choice([0, 1, 2, 17]), [draw.choice([1, 4, 7, 8, 9, 20]) for _ in range(2)]
    biased, added, relu, state = *(draw.random() < 0.5 for _ in range(3)), draw.getrandbits(64)
    given_groups = draw.choice([groups] * 9 + [0, -1, 7])

    def inputs() -> tuple[list[Any], bool]:
        local = random.Random(state)
        sources = inputs_ if linear else inputs_ // groups * max(kernel[0], 1) * max(kernel[1], 1)
        rowptr, columns, values = _csr(local, min(sources, 2**10), outputs, dtype)
        x = torch.randn(batch, inputs_, *([] if linear else maps), dtype=torch.float64).to(dtype)
        bias = torch.randn(outputs, dtype=torch.float64).to(dtype) if biased else None
        tensors, kept = _disguised(local, [x, rowptr, columns, values, bias])
        return tensors, kept

    def found(x: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        if linear:
            return sparse_linear(x, rowptr, columns, values, bias, relu)
        window = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": given_groups}
        if not added:
            return sparse_conv2d(x, rowptr, columns, values, bias, **window, relu=relu)
        out = sparse_conv2d(x, rowptr, columns, values, bias, **window)
        return sparse_conv2d(x, rowptr, columns, values, bias, **window, add=out, relu=relu)

    def dense(x: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        _checked((x, values) if bias is None else (x, values, bias), rowptr, columns)
        _require(columns.shape == values.shape and (bias is None or bias.shape == (len(rowptr) - 1,)))
        _require(x.dim() > 0 if linear else x.dim() == 4)
        sides_ = [*kernel, *stride, *padding, *dilation]
        if not linear:
            low = [1, 1, 1, 1, 0, 0, 1, 1]
            _require(given_groups > 0 and all(a <= b <= 4096 for a, b in zip(low, sides_, strict=True)))
            _require(min(x.size(1), len(rowptr) - 1) > 0)
            _require(x.size(1) % given_groups == 0 and (len(rowptr) - 1) % given_groups == 0)
        sources = x.size(-1) if linear else x.size(1) // given_groups * kernel[0] * kernel[1]
        _require(((columns >= 0) & (columns < sources)).all())
        rows = torch.repeat_interleave(torch.arange(len(rowptr) - 1), rowptr.long().diff())
        weight = torch.zeros(len(rowptr) - 1, sources, dtype=torch.float64)
        weight = weight.index_put((rows, columns.long()), values.double(), accumulate=True)
        shift = None if bias is None else bias.double()
        if linear:
            out = F.linear(x.double(), weight, shift)
        else:
            _require(min(x.shape[2:]) > 0)
            fits = [
                m + 2 * p >= d * (k - 1) + 1 for m, p, d, k in zip(x.shape[2:], padding, dilation, kernel, strict=True)
            ]
            _require(all(fits))
            x_ = F.pad(x.double(), (padding[1], padding[1], padding[0], padding[0]))
            places = F.unfold(x_, kernel, dilation, 0, stride) if x.numel() else None
            size = [
                (m + 2 * p - d * (k - 1) - 1) // s + 1
                for m, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
            ]
            if places is None:
                out = x_.new_zeros(len(x), len(weight), *size) + (0 if shift is None else shift.view(-1, 1, 1))
            else:
                parts = places.unflatten(1, (given_groups, -1))
                out = torch.einsum("gok,bgkp->bgop", weight.unflatten(0, (given_groups, -1)), parts).flatten(1, 2)
                out = out.unflatten(2, size) + (0 if shift is None else shift.view(-1, 1, 1))
            if added:
                out = out + out.to(x.dtype).double()
        return (out.relu() if relu else out).to(x.dtype)

    def call(seed: int) -> None:
        refusable = not _first(inputs, seed)[1]
        ways = (lambda way=way: [way(*inputs()[0])] for way in (found, dense))
        compare(seed, *ways, may_refuse=refusable, raw=False, spreads=True)

    what = "linear" if linear else f"{kernel} {stride} {padding} {dilation}, maps {maps}, {given_groups} groups"
    return f"{batch} × {inputs_} → {outputs}, {what}, {dtype}", call


def _first(inputs: Callable[[], Any], seed: int) -> Any:
    torch.manual_seed(seed)
    return inputs()


def _weights(out: Tensor) -> Tensor:
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)


def a_static_graph(draw: random.Random) -> Any:
    blocks = draw.randrange(1, 5)
    sizes = [draw.choice([0, 1, 2, 3, 5, 17]) for _ in range(blocks)]
    strides = [draw.choice([0, 1, 1, 2]) for _ in range(blocks)]
    batch, height, width = draw.choice([0, 1, 2, 3]), draw.choice([1, 2, 5, 8, 17]), draw.choice([1, 3, 4, 9, 16])
    dtype, biased, state = draw.choice(FLOATS[:3]), draw.random() < 0.5, draw.getrandbits(64)

    def inputs() -> tuple[list[Any], bool]:
        local = random.Random(state)
        index = local.choice([torch.int32, torch.int64])
        rowptr, columns, start, first = [0], [], sizes[0], 0
        for place, size in enumerate(sizes[1:], start=1):
            if strides[place - 1] == 2:
                first = start - sizes[place - 1]
            for _ in range(size):
                columns += [u for u in range(first, start) if local.random() < 0.5]
                rowptr.append(len(columns))
            start += size
        functions = sum(size for size, stride in zip(sizes, strides, strict=True) if stride)
        shapes = [(batch, sizes[0], height, width), (len(columns),), (functions,), (functions,), (functions, 3, 3)]
        x, values, *rest = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in [*shapes, (functions,)]]
        rows, edges = torch.tensor(rowptr, dtype=index), torch.tensor(columns, dtype=index)
        tensors = [x, rows, edges, values, *rest[:3], rest[3] if biased else None]
        tensors, kept = _disguised(local, tensors)
        changed = list(sizes), list(strides)
        if local.random() < 0.15:
            kept = False
            list_of_numbers = local.choice(changed)
            list_of_numbers[local.randrange(blocks)] = local.choice([-1, 0, 3, 100, *HUGE])
        if local.random() < 0.1:  # Maps too large for any memory, of which not one value is there.
            kept = False
            tensors[0] = torch.empty(batch, 0, 1, local.choice([2**59, 2**61]), dtype=dtype)
            changed = [0, *sizes[1:-1], 0][-blocks:], list(strides)
            if blocks > 1:
                tensors[1] = torch.zeros(sum(changed[0][1:]) + 1, dtype=index)
                tensors[2], tensors[3] = edges[:0], values[:0]
            count = sum(size for size, stride in zip(*changed, strict=True) if stride)
            tensors[4:7] = torch.ones(count).to(dtype), torch.ones(count).to(dtype), torch.ones(count, 3, 3).to(dtype)
            tensors[7] = None
        return [tensors[0], *changed, *tensors[1:]], kept

    def call(seed: int) -> None:
        refusable = not _first(inputs, seed)[1]
        compare(
            seed,
            lambda: [static_graph(*inputs()[0])],
            lambda: [_by_loop(*inputs()[0])],
            may_refuse=refusable,
            raw=False,
        )

    return f"sizes {sizes}, strides {strides}, maps {[batch, height, width]}, {dtype}", call


def _by_loop(
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
) -> Tensor:
    """A static graph node by node in float64."""
    functions = (scale, shift, kernel) if bias is None else (scale, shift, kernel, bias)
    _checked((x, values, *functions), rowptr, columns)
    _require(min(sizes) >= 0 and set(strides) <= {0, 1, 2} and x.dim() == 4 and x.size(1) == sizes[0])
    _require(min(x.shape[2:]) > 0 and max(x.shape) < 2**31 and max(sizes) < 1000)
    count = sum(size for size, stride in zip(sizes, strides, strict=True) if stride)
    _require(all(t.shape == (count, 3, 3)[: t.dim()] for t in functions) and kernel.dim() == 3)
    _require(all(t.dim() == 1 for t in functions if t is not kernel))
    _require(columns.shape == values.shape and len(rowptr) == sum(sizes[1:]) + 1)
    states: list[Tensor] = []
    first = function = 0
    maps = x.shape[2:]
    for place, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        start = len(states)
        for node in range(size):
            state = x[:, node].double() if place == 0 else x.new_zeros(len(x), *maps, dtype=torch.float64)
            row = start + node - sizes[0]
            for edge in range(int(rowptr[row]), int(rowptr[row + 1])) if place else ():
                _require(first <= columns[edge] < start)
                state = state + values[edge].double() * states[columns[edge]]
            if stride:
                state = (scale[function].double() * state + shift[function].double()).relu()
                state = F.conv2d(state[:, None], kernel[function].double()[None, None], None, stride, 1)[:, 0]
                state = state if bias is None else (state + bias[function].double()).relu()
                function += 1
            states.append(state)
        if stride == 2:
            maps, first = torch.Size((side + 1) // 2 for side in maps), start
    last = states[len(states) - sizes[-1] :]
    return (torch.stack(last, dim=1) if last else x.new_zeros(len(x), 0, *maps)).to(x.dtype)


def selection(draw: random.Random) -> Any:
    n, dtype, state = draw.choice([0, 1, 2, 5, 63, 64, 65, 1000]), draw.choice(FLOATS), draw.getrandbits(64)
    k = draw.choice([draw.randrange(1, n + 1) if n else 1, 1, n, n, 0, -1, n + 1, n + 100, *HUGE[:2]])
    guess = draw.choice([-1, 0, 2**20, 2**30, 2**31, 2**62, -(2**40)])
    carried = [guess, *(draw.choice([2, 14, 30, 0, -5, 64, 2**40]) for _ in range(2))]

    def inputs() -> Tensor:
        local = random.Random(state)
        weight = torch.randn(n).to(dtype) if local.random() < 0.5 else torch.randint(-3, 4, (n,)).to(dtype)
        return _disguised(local, [weight])[0][0]

    def found() -> Sequence[Any]:
        weight, before = inputs(), torch.tensor(carried)
        first, again = (torch.ops.dnw_graph.select(weight, k, "graph", before) for _ in range(2))
        return [first, again, select_top_k(weight, k)]

    def expected() -> Sequence[Any]:
        weight = inputs()
        _require(weight.dim() == 1 and weight.dtype in FLOATS and 1 <= k <= len(weight) < 2**40)
        if weight.is_meta:
            return [torch.empty(k, dtype=torch.int64, device="meta")] * 3
        _require(weight.layout is torch.strided and weight.isfinite().all())
        return [weight.abs().argsort(descending=True, stable=True)[:k].sort().values.as_subclass(Tensor)] * 3

    return f"{k} of {n} {dtype}, carried {carried}", lambda seed: compare(seed, found, expected, True, raw=False)


def layout(draw: random.Random) -> Any:
    shape = [draw.choice([0, 1, 2, 7, 16, 17, 33]) for _ in range(draw.randrange(2, 6))]
    dtype, state = draw.choice(FLOATS[:3]), draw.getrandbits(64)

    def inputs() -> Tensor:
        local = random.Random(state)
        z = torch.randn(shape).to(dtype)
        z = z.movedim(1, -1).contiguous().movedim(-1, 1) if local.random() < 0.6 else z
        z = local.choice(KEPT)(z) if local.random() < 0.3 else z
        return z.detach().requires_grad_()

    def differentiated(function: Callable[[Tensor], Tensor]) -> Sequence[Any]:
        z = inputs()
        out = function(z)
        grad = _weights(out)
        grad = grad.movedim(0, -1).contiguous().movedim(-1, 0) if state % 2 else grad
        return [out, *torch.autograd.grad(out, z, negated(grad) if state % 3 == 0 else grad)]

    ways = (functools.partial(differentiated, way) for way in (batch_last, torch.clone))
    return f"{shape} {dtype}", functools.partial(
        compare, found=next(ways), expected=next(ways), may_refuse=False, raw=True
    )


def dense_product(draw: random.Random) -> Any:
    m, n, k = (draw.choice([0, 1, 3, 16, 40]) for _ in range(3))
    dtype, state = draw.choice(FLOATS[:2]), draw.getrandbits(64)

    def inputs() -> list[Tensor]:
        pair = [torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)]
        a, b = _disguised(random.Random(state), pair)[0]
        _require(a.device == b.device)  # Of others PyTorch itself returns memory that nobody has written.
        return [a, b]

    def plain() -> Sequence[Any]:
        a, b = inputs()
        return [a @ b.t()]

    def call(seed: int) -> None:
        compare(seed, lambda: [product_with_transpose(*inputs())], plain, may_refuse=True, raw=True)

    return f"[{m}, {k}] × [{n}, {k}]ᵀ {dtype}", call


# Node functions whose modules somebody has changed.

Change = Callable[[random.Random, nn.Module], object]


def _parts(function: nn.Module) -> list[nn.Module]:
    return [getattr(function, name) for name in ("norm", "norm2", "conv") if hasattr(function, name)]


def replaced_tensor(draw: random.Random, function: nn.Module) -> None:
    module = draw.choice(_parts(function))
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    name = draw.choice([name for name in names if isinstance(getattr(module, name, None), Tensor)] or ["weight"])
    value = getattr(module, name)
    if value is None:
        return
    value = draw.choice([*KEPT, *KEPT, *CHANGED, lambda t: None])(value.detach())
    if name.startswith("running") and value is not None and value.layout is torch.strided and 0 in value.stride():
        return  # PyTorch itself writes to it in no particular order.
    if value is not None and name in ("weight", "bias"):
        value = nn.Parameter(value, requires_grad=value.is_floating_point() and draw.random() < 0.8)
    setattr(module, name, value)


def replaced_attribute(draw: random.Random, function: nn.Module) -> None:
    module = draw.choice(_parts(function))
    options: dict[str, list[Any]] = {
        "eps": [0.1, 0.0, -1.0, 1, float("nan")],
        "momentum": [None, 0.0, 1.0, 0.5, 2.0],
        "track_running_stats": [True, False],
        "training": [True, False],
        "num_features": [1, 100],
        "stride": [(1, 1), (2, 2), (1, 2), (3, 3), [2, 2], 2],
        "padding": [(0, 0), (1, 1), (2, 2), "same", 1],
        "dilation": [(1, 1), (2, 2)],
        "groups": [1, 2],
        "in_channels": [1],
        "kernel_size": [(5, 5)],
        "padding_mode": ["zeros", "reflect", "circular"],
    }
    name = draw.choice([name for name in options if hasattr(module, name)])
    setattr(module, name, draw.choice(options[name]))


def replaced_module(draw: random.Random, function: nn.Module) -> None:
    n = function.conv.in_channels
    norms = [
        lambda: nn.BatchNorm2d(n),
        lambda: nn.BatchNorm2d(n + 2),
        lambda: nn.BatchNorm2d(n, affine=False),
        lambda: nn.BatchNorm2d(n, track_running_stats=False),
        lambda: nn.InstanceNorm2d(n),
        lambda: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm2d(n + 1, affine=True),
        lambda: nn.GroupNorm(1, n),
        lambda: nn.Identity(),
        lambda: nn.Sequential(nn.BatchNorm2d(n)),
        lambda: nn.SyncBatchNorm(n).eval(),
        lambda: nn.LazyBatchNorm2d(),
    ]
    convolutions = [
        lambda: nn.Conv2d(n, n, 3, 1, 1, groups=n, bias=False),
        lambda: nn.Conv2d(n, n, 3, 1, 1, groups=n),
        lambda: nn.Conv2d(n, n, 3, 1, 1, bias=False),
        lambda: nn.Conv2d(n, 2 * n, 3, 1, 1, groups=n, bias=False),
        lambda: nn.Conv2d(n + 1, n + 1, 3, 1, 1, groups=n + 1, bias=False),
        lambda: nn.Conv2d(n, n, 5, 1, 2, groups=n, bias=False),
        lambda: nn.ConvTranspose2d(n, n, 3, 1, 1, groups=n, bias=False),
    ]
    if draw.random() < 0.6:
        function.norm = draw.choice(norms)()
    else:
        function.conv = draw.choice(convolutions)()


def doubled(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad * 2


def listened_to(draw: random.Random, function: nn.Module) -> None:
    module = draw.choice(_parts(function))
    add = [
        lambda: module.register_forward_hook(lambda module, args, out: out + 0.5),
        lambda: module.register_forward_pre_hook(lambda module, args: (args[0] + 0.5, *args[1:])),
        lambda: module.register_full_backward_hook(lambda module, grads, out_grads: tuple(map(doubled, grads))),
        lambda: module.register_full_backward_pre_hook(lambda module, grads: tuple(map(doubled, grads))),
    ]
    draw.choice(add)()


def other_forward(draw: random.Random, function: nn.Module) -> None:
    module = draw.choice(_parts(function))
    old = module.forward
    if draw.random() < 0.5:
        module.forward = lambda *args: old(*args) + 0.5
    else:
        module.forward = functools.partial(lambda old, *args: old(*args) * 2, old)


def parametrized(draw: random.Random, function: nn.Module) -> None:
    module = draw.choice(_parts(function))
    if getattr(module, "weight", None) is not None and module.weight.dim() > 1:
        draw.choice([parametrizations.weight_norm, parametrizations.orthogonal])(module)
    elif getattr(module, "weight", None) is not None:
        torch.nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())


def in_evaluation(draw: random.Random, function: nn.Module) -> None:
    function.eval()


CHANGES: list[Change] = [
    lambda draw, function: None,
    in_evaluation,
    replaced_tensor,
    replaced_tensor,
    replaced_tensor,
    replaced_attribute,
    replaced_module,
    listened_to,
    other_forward,
    parametrized,
]


def _made(draw: random.Random, kind: type[nn.Module], n: int, stride: int, norm: str, dtype: torch.dtype) -> nn.Module:
    function = kind(n, stride, norm)
    for name, value in [*function.named_parameters(), *function.named_buffers()]:
        if value.is_floating_point():
            nn.init.uniform_(value.detach(), 0.5 if "var" in name else -1, 2)
    function.to(dtype)
    for _ in range(draw.randrange(3)):
        draw.choice(CHANGES)(draw, function)
    return function


def _maps(draw: random.Random, z: Tensor) -> Tensor:
    ways = [
        *[batch_last] * 10,
        *[lambda z: batch_last(draw.choice(KEPT)(z))] * 3,
        *KEPT,
        lambda z: draw.choice(CHANGED)(z),
        lambda z: batch_last(z[:1].expand(z.shape)),
        lambda z: z[:, :1].expand(z.shape),
        lambda z: z.to(memory_format=torch.channels_last),
        lambda z: z.movedim(0, -1),
    ]
    return draw.choice(ways)(z)


def _layers(function: nn.Module, z: Tensor, nodes: range | None) -> Tensor:
    """What a node function is, layer by layer."""
    if nodes is not None:
        _require(0 <= nodes.start <= nodes.stop <= function.conv.in_channels and z.size(1) == len(nodes))
        full = z.new_zeros(z.size(0), function.conv.in_channels, *z.shape[2:])
        full[:, nodes.start : nodes.stop] = z
        return _layers(function, full, None)[:, nodes.start : nodes.stop]
    if isinstance(function, ReluConvSendNorm):
        return function.norm(function.conv(z.relu()))
    z = function.conv(function.norm(z).relu())
    return function.norm2(z).relu() if isinstance(function, NormReluConvNormRelu) else z


def _called(function: nn.Module, z: Tensor, nodes: range | None) -> Tensor:
    if isinstance(function, ReluConvSendNorm):
        z = function.send(z) if nodes is None else function.send(z, nodes)
    return function(z) if nodes is None else function(z, nodes)


def _differentiated(function: nn.Module, z: Tensor, out: Tensor, grad: Callable[[Tensor], Tensor]) -> Sequence[Any]:
    leaves = [t for t in (z, *function.parameters()) if t.requires_grad]
    grads: Sequence[Any] = ()
    if out.requires_grad and not out.is_meta:
        grads = torch.autograd.grad(out, leaves, grad(_weights(out)), allow_unused=True)
    return [out, *grads, *(buffer for buffer in function.buffers() if not buffer.is_meta)]


def node_function(draw: random.Random) -> Any:
    kind, norm = draw.choice([NormReluConv, NormReluConvNormRelu, ReluConvSendNorm]), draw.choice(["batch", "instance"])
    n, stride, dtype = draw.choice([1, 2, 3, 5]), draw.choice([1, 2]), draw.choice(FLOATS[:2])
    shape = (draw.choice([0, 1, 2, 3, 8, 19]), n, *(draw.choice([1, 2, 3, 5]) for _ in range(2)))
    state, wrong = draw.getrandbits(64), draw.choice([0, 0, 0, 0, 0, 1, -1, 3])
    nodes = None
    if norm == "instance" and draw.random() < 0.2:
        nodes = draw.choice([range(1), range(n), range(n // 2, n), range(-1, n - 1), range(n, n + 2), range(1, n + 2)])
    count = max(0, (n if nodes is None else len(nodes)) + wrong)

    def computed(function_of: Callable[..., Tensor], contiguous: bool) -> Sequence[Any]:
        local = random.Random(state)
        function = _made(local, kind, n, stride, norm, dtype)
        z = _maps(local, torch.randn(shape[0], count, *shape[2:], dtype=dtype)).detach()
        if contiguous and z.layout is torch.strided and z.numel() < 2**40:
            z = z.resolve_neg().clone(memory_format=torch.contiguous_format)
        z.requires_grad_(z.is_floating_point() and local.random() < 0.8)
        out = function_of(function, z, nodes)
        return _differentiated(function, z, out, negated if state % 5 == 0 else lambda grad: grad)

    def call(seed: int) -> None:
        # PyTorch itself takes some of what lies on several devices, and anything for no images.
        odd = not shape[0]
        with suppress(Exception):  # Some changes cannot follow each other.
            function = _made(random.Random(state), kind, n, stride, norm, dtype)
            odd = odd or any(parameter.is_meta for parameter in function.parameters())
        compare(
            seed,
            lambda: computed(_called, False),
            lambda: computed(_layers, True),
            may_refuse=nodes is not None or odd or state % 5 == 0,
            raw=True,
            spreads=nodes is not None,  # to the gradients of the other nodes' parameters
        )

    return f"{kind.__name__}({n}, {stride}, {norm!r}) {dtype} at {list(shape)}, {count} maps, nodes={nodes}", call


def graph(draw: random.Random) -> Any:
    blocks = [draw.choice([1, 2, 4, 6]) for _ in range(draw.randrange(2, 5))]
    if draw.random() < 0.3:
        blocks = [blocks[0]] * len(blocks)
    dtype, batch, side = draw.choice(FLOATS[:2]), draw.choice([1, 2, 8, 16, 17]), draw.choice([1, 2, 4])
    edges = sum(blocks[0] * size for size in blocks[1:2])
    kind, norm = draw.choice([NormReluConv, NormReluConvNormRelu]), draw.choice(["batch", "instance"])
    shared, state = draw.random() < 0.4, draw.getrandbits(64)

    def computed(propagation: str) -> Sequence[Any]:
        local = random.Random(state)
        function: Any = functools.partial(kind, norm=norm)
        function = function(local.choice(blocks)) if shared else function
        model = NeuralGraph(blocks, max(1, edges // 2), node_function=function, propagation=propagation).to(dtype)
        for module in model.modules():
            if isinstance(module, NormReluConv):
                local.choice(CHANGES)(local, module)
        x = torch.randn(batch, blocks[0], side, side, dtype=dtype)
        x = local.choice(KEPT[:4])(x).detach().requires_grad_()
        return _differentiated(model, x, model(x), lambda grad: grad)

    ways = (functools.partial(computed, way) for way in (draw.choice(["sparse", "auto"]), "block"))
    what = f"{blocks} of {kind.__name__}, {norm}, {dtype}, {batch} × {side}², shared={shared}"
    # In a dense product a state that is NaN reaches every node, by whatever edges.
    return what, functools.partial(
        compare, found=next(ways), expected=next(ways), may_refuse=False, raw=True, spreads=True
    )


def threads(draw: random.Random) -> Any:
    n, batch, state = draw.choice([2, 5]), draw.choice([2, 9, 16]), draw.getrandbits(64)

    def computed(workers: int) -> Sequence[Any]:
        local = random.Random(state)
        functions = [NormReluConv(n) for _ in range(4)]
        inputs = [batch_last(torch.randn(batch, n, 4, 4)).requires_grad_() for _ in functions]
        products = [(torch.randn(5, 70), *_csr(local, 5, 6, torch.float32)) for _ in functions]

        def work(place: int) -> Sequence[Any]:
            out = functions[place](inputs[place])
            index = select_top_k(products[place][0].flatten(), 20)
            return [
                *_differentiated(functions[place], inputs[place], out, lambda g: g),
                sparse_product(*products[place]),
                index,
            ]

        with ThreadPoolExecutor(workers) as pool:
            return [result for results in pool.map(work, range(4)) for result in results]

    what = f"4 at once, {n} nodes, {batch} images"
    return what, lambda seed: compare(seed, lambda: computed(4), lambda: computed(1), may_refuse=False, raw=False)


KINDS = (
    node_function,
    a_sparse_product,
    node_function,
    a_static_graph,
    a_sparse_layer,
    node_function,
    selection,
    graph,
    layout,
    node_function,
    dense_product,
    node_function,
    threads,
)
