"""Static graphs without dead nodes, as layers of a compact model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dnw_graph.ops.flops  # noqa: F401
from dnw_graph.compaction.plain_layers import Layer, require, require_whole
from dnw_graph.compaction.products import Product, check_csr
from dnw_graph.ops import static_graph
from dnw_graph.ops.static_plan import GraphTensors

STATE_DTYPES = {None: None, "bfloat16": torch.bfloat16}


class Blocks(Layer):
    """A graph of blocks of nodes: the first are inputs, the last outputs.

    Attributes:
        sizes: Number of nodes of each block.
    """

    sizes: list[int]

    @property
    def num_inputs(self) -> int:
        """Number of inputs."""
        return self.sizes[0]

    @property
    def num_outputs(self) -> int:
        """Number of outputs."""
        return self.sizes[-1]


class StaticGraph(Blocks):
    """A static graph, from the states of its inputs to the sums that its outputs receive.

    Args:
        products: One per block of nodes after the first.
        functions: The node functions of all blocks but the first and the last.
        feeding: The blocks of nodes that feed each block after the first: first and end, counted from the inputs.
    """

    options = ("feeding",)

    def __init__(
        self, products: Sequence[Product], functions: Sequence[nn.Module], feeding: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        require(len(products) == len(functions) + 1 == len(feeding), "a static graph needs one product per block")
        self.sizes = [products[0].num_inputs]
        for product, (start, stop) in zip(products, feeding, strict=True):
            require(
                0 <= start < stop <= len(self.sizes) and sum(self.sizes[start:stop]) == product.num_inputs,
                f"{product} does not fit blocks of {self.sizes} nodes",
            )
            self.sizes.append(product.num_outputs)
        self.products = nn.ModuleList(products)
        self.functions = nn.ModuleList(functions)
        self.feeding = [list(blocks) for blocks in feeding]

    def absorb(self, scale: Tensor, shift: Tensor) -> bool:
        """Fold a scale and a shift of the outputs into the last product."""
        last = self.products[-1]
        return isinstance(last, Product) and last.absorb(scale, shift)

    def forward(self, z: Float[Tensor, "batch inputs *space"]) -> Float[Tensor, "batch outputs *space"]:
        """Compute the blocks in order."""
        states = [z]
        for product, function, (start, stop) in zip(self.products, [*self.functions, None], self.feeding, strict=True):
            received = product(states[start] if stop - start == 1 else torch.cat(states[start:stop], dim=1))
            states.append(received if function is None else function(received))
        return states[-1]


class FusedGraph(Blocks):
    """One or several static graphs in one operator, :func:`dnw_graph.ops.static_graph`, and a shift of the outputs.

    Its input is the input of the input nodes. Arguments are those of the operator; ``state_dtype`` is a name.
    """

    options = ("sizes", "strides", "state_dtype")
    rowptr: Tensor
    columns: Tensor
    values: Tensor
    scale: Tensor
    shift: Tensor
    kernel: Tensor
    bias: Tensor | None
    output_shift: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        strides: Sequence[int],
        rowptr: Tensor,
        columns: Tensor,
        values: Tensor,
        scale: Tensor,
        shift: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        output_shift: Tensor,
        state_dtype: str | None = None,
    ) -> None:
        super().__init__()
        require(state_dtype in STATE_DTYPES, f"states have type {state_dtype!r:.50}")
        require_whole(sizes, 1, "sizes of blocks")
        require(len(sizes) == len(strides) >= 2, "a static graph needs a stride for every block")
        require(set(strides) <= {0, 1, 2}, f"strides are 0, 1 or 2; got {list(strides)}")
        functions = sum(size for size, stride in zip(sizes, strides, strict=True) if stride)
        require(len(rowptr) == sum(sizes[1:]) + 1, f"{sum(sizes[1:])} nodes with edges need one more row pointer")
        require(
            scale.shape == shift.shape == kernel.shape[:1] == (functions,) and kernel.shape[1:] == (3, 3),
            f"{functions} node functions need a scale, a shift and a 3×3 kernel each",
        )
        require(bias is None or bias.shape == scale.shape, f"{functions} node functions need a bias each")
        require(output_shift.shape == (sizes[-1],), f"{sizes[-1]} outputs need a shift each")
        check_csr(rowptr, columns, values, sum(sizes))
        for size, start in zip(sizes[1:], accumulate(sizes), strict=False):
            first, last = rowptr[[start - sizes[0], start - sizes[0] + size]].tolist()
            require(bool((columns[first:last] < start).all()), f"an edge to nodes >= {start} starts there")
        self.sizes = list(sizes)
        self.sources = sum(sizes)
        self.strides = list(strides)
        self.state_dtype = state_dtype
        self.register(
            rowptr=rowptr,
            columns=columns,
            values=values,
            scale=scale,
            shift=shift,
            kernel=kernel,
            bias=bias,
            output_shift=output_shift,
        )

    @property
    def rounding(self) -> torch.dtype | None:
        """The dtype that states are rounded to, or None."""
        return STATE_DTYPES[self.state_dtype]

    def tensors(self) -> GraphTensors:
        """Return the tensors that the operator takes."""
        edges = (self.rowptr, self.columns, self.values)
        return GraphTensors(*edges, self.scale, self.shift, self.kernel, self.bias)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        """Compute the blocks in order."""
        edges = (self.rowptr, self.columns, self.values)
        functions = (self.scale, self.shift, self.kernel)
        z = static_graph(x, self.sizes, self.strides, *edges, *functions, bias=self.bias, state_dtype=self.rounding)
        return z + self.output_shift.view(-1, 1, 1)
