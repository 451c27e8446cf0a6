"""The arguments of each kernel after the number of threads: numbers, then tensors whose shapes follow from them.

They must match ``kernels/kernels.cpp``. A sequence of numbers is passed as length and address, a sequence of tensors as
the address of an array of addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch

# The dtypes of each kind of tensor; within a call all tensors of one kind have the same dtype.
TYPES = {
    "number": {torch.float32: "float32", torch.float64: "float64"},
    "index": {torch.int32: "int32", torch.int64: "int64"},
    "place": {torch.int64: "int64"},
    "sum": {torch.float64: "float64"},
}
PIECE = 1024  # Values whose squares are summed in one piece, see ``kernels/combination.h``.
NO_NORM, BATCH, INSTANCE, CONSTANT = range(4)  # Norms of a node function; CONSTANT: mean and variance are given.


class Expected(NamedTuple):
    """A contiguous tensor."""

    kind: str
    shape: tuple[int, ...]
    optional: bool = False


def _number(*shape: int, optional: bool = False) -> Expected:
    return Expected("number", shape, optional)


def _index(*shape: int) -> Expected:
    return Expected("index", shape)


Arguments = list[Expected | list[Expected]]


def _csr(targets: int, edges: int) -> Arguments:
    return [_index(targets + 1), _index(edges)]


def _sparse_product(targets: int, features: int, edges: int, sizes: Sequence[int]) -> Arguments:
    pieces = [_number(size, features) for size in sizes]
    return [pieces, *_csr(targets, edges), _number(edges), _number(targets, features)]


def _sampled_product(targets: int, features: int, edges: int, sizes: Sequence[int]) -> Arguments:
    pieces = [_number(size, features) for size in sizes]
    return [pieces, *_csr(targets, edges), _number(targets, features), _number(edges)]


def _by_source(targets: int, sources: int, edges: int) -> Arguments:
    return [*_csr(targets, edges), _index(sources + 1), _index(edges)]


def _static_plan(
    edges: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    channels: int,
    stem_stride: int,
    relu: int,
    pooled: int,
    classes: int,
    bits: int,
) -> Arguments:
    functions = sum(size for size, stride in zip(sizes, strides, strict=True) if stride)
    vector = _number(functions)
    csr = [*_csr(sum(sizes[1:]), edges), _number(edges)]
    stem = [_number(sizes[0], channels, 3, 3, optional=True), _number(sizes[0], optional=True)]
    classifier = [_number(classes, sizes[-1], optional=True), _number(classes, optional=True)]
    optional = [vector._replace(optional=True), _number(sum(sizes), optional=True)]
    graph = [*csr, vector, vector, _number(functions, 3, 3), *optional]
    return [*graph, _number(sizes[-1], optional=True), *stem, *classifier, Expected("place", (1,))]


def _static_run(plan: int, batch: int, channels: int, height: int, width: int, out_shape: Sequence[int]) -> Arguments:
    return [_number(batch, channels, height, width), _number(*out_shape)]


def _static_free() -> Arguments:
    return [Expected("place", (1,))]


def _sparse_linear(batch: int, inputs: int, outputs: int, edges: int, relu: int) -> Arguments:
    bias, out = _number(outputs, optional=True), _number(batch, outputs)
    return [_number(batch, inputs), *_csr(outputs, edges), _number(edges), bias, out]


def _sparse_convolution(
    batch: int,
    inputs: int,
    outputs: int,
    edges: int,
    groups: int,
    relu: int,
    maps: Sequence[int],
    out_maps: Sequence[int],
    window: Sequence[int],
) -> Arguments:
    bias, add = _number(outputs, optional=True), _number(batch, outputs, *out_maps, optional=True)
    first = [_number(batch, inputs, *maps), *_csr(outputs, edges), _number(edges)]
    return [*first, bias, add, _number(batch, outputs, *out_maps)]


def _sampled_linear(batch: int, sources: int, targets: int, edges: int) -> Arguments:
    order = _index(edges)._replace(optional=True)
    return [_number(batch, targets), _number(batch, sources), *_csr(targets, edges), order, _number(edges)]


def _sparse_convolution_grad(
    batch: int,
    inputs: int,
    outputs: int,
    edges: int,
    groups: int,
    maps: Sequence[int],
    out_maps: Sequence[int],
    window: Sequence[int],
) -> Arguments:
    x = _number(batch, inputs, *maps)
    first = [_number(batch, outputs, *out_maps), x, *_csr(outputs, edges), _number(edges)]
    return [*first, x._replace(optional=True), _number(edges, optional=True)]


def _largest(count: int, k: int, low: int, high: int) -> Arguments:
    return [_number(count), Expected("place", (k,)), Expected("place", (4,))]


def _function(
    nodes: int, height: int, width: int, batch: int, norm: int, relu: int, stride: int, eps: float
) -> tuple[Arguments, Expected, list[Expected]]:
    """Return the common arguments of both kernels of a node function, its result, and its gradients."""
    maps = (nodes, height, width, batch)
    vector, kernels = _number(nodes, optional=True), _number(nodes, 1, 3, 3, optional=True)
    statistics = _number(*((nodes, batch) if norm == INSTANCE else (nodes,)), optional=norm == NO_NORM)
    first = [_number(*maps), vector, vector, kernels._replace(optional=not stride), statistics, statistics]
    step = max(stride, 1)
    result = _number(nodes, (height + step - 1) // step, (width + step - 1) // step, batch)
    return [*first], result, [_number(*maps, optional=True), vector, vector, kernels]


def _node_function(*numbers: Any) -> Arguments:
    first, result, _ = _function(*numbers)
    return [*first, result]


def _node_function_grad(*numbers: Any) -> Arguments:
    first, result, grads = _function(*numbers)
    return [*first, result, *grads]


def _exchanged(first: int, middle: int, last: int) -> Arguments:
    return [_number(first, middle, last), _number(last, middle, first)]


def _combination(count: int, terms: int) -> Arguments:
    vector = _number(count)
    return [_number(count, optional=True), _number(terms), [vector] * terms, vector]


def _error_squares(count: int, terms: int, rtol: float, atol: float) -> Arguments:
    vector = _number(count)
    return [_number(terms), [vector] * terms, vector, vector, Expected("sum", ((count + PIECE - 1) // PIECE,))]


SIGNATURES: dict[str, tuple[Callable[..., Arguments], tuple[str, ...]]] = {
    "sparse_product": (_sparse_product, ("number", "index")),
    "sampled_product": (_sampled_product, ("number", "index")),
    "by_source": (_by_source, ("index",)),
    "static_plan": (_static_plan, ("number", "index")),
    "static_run": (_static_run, ("number",)),
    "static_free": (_static_free, ("place",)),
    "sparse_linear": (_sparse_linear, ("number", "index")),
    "sparse_convolution": (_sparse_convolution, ("number", "index")),
    "sampled_linear": (_sampled_linear, ("number", "index")),
    "sparse_convolution_grad": (_sparse_convolution_grad, ("number", "index")),
    "largest": (_largest, ("number",)),
    "node_function": (_node_function, ("number",)),
    "node_function_grad": (_node_function_grad, ("number",)),
    "exchanged": (_exchanged, ("number",)),
    "combination": (_combination, ("number",)),
    "error_squares": (_error_squares, ("number",)),
}
"""For each kernel, its tensors as a function of its numbers, and its supported kinds of tensors by dtype."""


def symbols() -> Iterator[str]:
    """Return the names of all kernels in the library."""
    for name, (_, kinds) in SIGNATURES.items():
        for types in product(*(TYPES[kind].values() for kind in kinds)):
            yield "_".join([name, *types])
