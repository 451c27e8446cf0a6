"""Registers the operators' FLOPs with PyTorch's ``FlopCounterMode``.

This is a separate module because the counter is slow to import.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import dnw_graph.ops  # noqa: F401  # the operators


@register_flop_formula(torch.ops.dnw_graph.sparse_product)
def _product_flops(z: Any, rowptr: Any, columns: Any, values: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * columns[0] * z[1]


@register_flop_formula(torch.ops.dnw_graph.sampled_product)
def _sampled_flops(received: Any, z: Any, rowptr: Any, columns: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * columns[0] * z[1]


@register_flop_formula(torch.ops.dnw_graph.sparse_linear)
def _linear_flops(x: Any, rowptr: Any, columns: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * columns[0] * math.prod(x[:-1])


@register_flop_formula(torch.ops.dnw_graph.sparse_convolution)
def _convolution_flops(x: Any, rowptr: Any, columns: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * columns[0] * out_shape[0] * math.prod(out_shape[2:])


@register_flop_formula(torch.ops.dnw_graph.static_graph, get_raw=True)
def _static_graph_flops(
    x: Tensor, sizes: list[int], strides: list[int], rowptr: Tensor, *args: Any, **kwargs: Any
) -> int:
    # The edges of a block follow from the row pointers, whose values must therefore be known.
    bounds = rowptr[[0, *accumulate(sizes[1:], initial=0)]].tolist()
    multiply_adds = 0
    height, width = x.shape[2:]
    for size, stride, (begin, end) in zip(sizes, strides, pairwise(bounds), strict=True):
        multiply_adds += (end - begin) * height * width
        if stride == 2:
            height, width = (height + 1) // 2, (width + 1) // 2
        if stride:
            multiply_adds += 9 * size * height * width
    return 2 * x.size(0) * multiply_adds
