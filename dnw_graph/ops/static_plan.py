"""Static graphs packed for the CPU kernel, once for many calls: edges are checked when a plan is created."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dnw_graph.ops.call import run
from dnw_graph.ops.operands import check_memory

MOST_EDGES = 1024
"""Largest number of edges of a node whose sum uses 16 bits; with more, each would have too few bits."""


class GraphTensors(NamedTuple):
    """The tensors of :func:`dnw_graph.ops.static_graph`."""

    rowptr: Tensor
    columns: Tensor
    values: Tensor
    scale: Tensor
    shift: Tensor
    kernel: Tensor
    bias: Tensor | None = None
    state_scale: Tensor | None = None


@dataclass(frozen=True)
class Ends:
    """Layers before and after a static graph.

    Args:
        stem: A 3×3 convolution with a padding of 1 before the graph: ``[inputs, channels, 3, 3]``.
        stem_bias: Its bias.
        stem_stride: Its stride, 1 or 2.
        shift: Added to the outputs of the graph.
        relu: Whether a ReLU follows.
        mean: Whether the mean over the map of every output follows.
        weight: Matrix of a linear layer after the mean.
        bias: Its bias.
    """

    stem: Tensor | None = None
    stem_bias: Tensor | None = None
    stem_stride: int = 1
    shift: Tensor | None = None
    relu: bool = False
    mean: bool = False
    weight: Tensor | None = None
    bias: Tensor | None = None


class StaticPlan:
    """A static graph ready to run on a CPU; created by :meth:`make`.

    Several threads may call one plan at the same time. It keeps its working memory.
    """

    def __init__(self, handle: Tensor, sizes: Sequence[int], strides: Sequence[int], ends: Ends) -> None:
        self._handle = int(handle)
        self._outputs = sizes[-1] if ends.weight is None else len(ends.weight)
        self._steps = [ends.stem_stride if ends.stem is not None else 1, *strides]
        self._mean = ends.mean
        self._nodes = sum(sizes) + 1
        weakref.finalize(self, run, "static_free", (), handle)

    @classmethod
    def make(
        cls,
        sizes: Sequence[int],
        strides: Sequence[int],
        graph: GraphTensors,
        state_dtype: torch.dtype | None = None,
        ends: Ends = Ends(),
    ) -> StaticPlan | None:
        """Return a plan for consistent tensors, or None if PyTorch's operations must be used.

        Raises:
            InputError: If an edge does not lead from an earlier block with maps of the same size.
        """
        if state_dtype is not None and graph.values.dtype != torch.float32:
            return None
        if state_dtype is torch.int8 and len(graph.columns) and int(graph.rowptr.diff().max()) > MOST_EDGES:
            return None
        handle = torch.zeros(1, dtype=torch.int64, device="cpu")
        numbers = (
            len(graph.columns),
            sizes,
            strides,
            0 if ends.stem is None else ends.stem.size(1),
            ends.stem_stride,
            int(ends.relu),
            int(ends.mean),
            0 if ends.weight is None else len(ends.weight),
            0 if state_dtype is None else 8 * state_dtype.itemsize,
        )
        around = (ends.shift, ends.stem, ends.stem_bias, ends.weight, ends.bias)
        tensors = [None if each is None else each.contiguous() for each in (*graph, *around)]
        return cls(handle, sizes, strides, ends) if run("static_plan", numbers, *tensors, handle) else None

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return the result of the graph, with its ends, for ``[batch, channels, height, width]``.

        None if the kernel cannot read this tensor: it has another dtype, or is not stored plainly in memory.

        Raises:
            InputError: If the states do not fit in memory.
        """
        sides = list(x.shape[2:])
        check_memory((x.size(0), 2 * self._nodes, sides[0] + 2, sides[1] + 2))
        for _ in range(self._steps.count(2)):
            sides = [(side + 1) // 2 for side in sides]
        shape = [x.size(0), self._outputs, *([] if self._mean else sides)]
        out = x.new_empty(shape)
        return out if run("static_run", (self._handle, *x.shape, shape), x.contiguous(), out) else None
