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
from dnw_graph.errors import InputError
from dnw_graph.ops import static_graph
from dnw_graph.ops.static_plan import GraphTensors
from dnw_graph.ops.whole_graph import largest_states

STATE_DTYPES = {None: None, "bfloat16": torch.bfloat16, "int8": torch.int8}
HEADROOM = 2
"""Rounding twice as coarse costs less accuracy than cutting off states that are larger than those of the example."""


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
    state_scale: Tensor | None

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
        state_scale: Tensor | None = None,
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
        require((state_dtype == "int8") == (state_scale is not None), "states of 8 bits, and no others, need a scale")
        if state_scale is not None:
            require(state_scale.shape == (sum(sizes),), f"{sum(sizes)} nodes need a scale each")
            require(bool((state_scale > 0).all()), "scales of states must be positive")
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
            state_scale=state_scale,
        )

    @property
    def rounding(self) -> torch.dtype | None:
        """The dtype that states are rounded to, or None."""
        return STATE_DTYPES[self.state_dtype]

    def tensors(self) -> GraphTensors:
        """Return the tensors that the operator takes."""
        edges = (self.rowptr, self.columns, self.values)
        return GraphTensors(*edges, self.scale, self.shift, self.kernel, self.bias, self.state_scale)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        """Compute the blocks in order."""
        graph = self.tensors()
        z = static_graph(x, self.sizes, self.strides, **graph._asdict(), state_dtype=self.rounding)
        return z + self.output_shift.view(-1, 1, 1)


def round_states(model: nn.Module, state_dtype: torch.dtype, example: Tensor | None) -> None:
    """Let static graphs that are single operators round the states of nodes.

    Args:
        model: What holds the graphs.
        state_dtype: What they are rounded to.
        example: Images from which the scales for ``torch.int8`` come.

    Raises:
        InputError: If there is no such graph.
    """
    graphs = [module for module in model.modules() if isinstance(module, FusedGraph)]
    if not graphs:
        raise InputError("state_dtype is for static graphs of norm → ReLU → 3×3 convolution, and this model has none")
    scales = _scales(model, graphs, example) if state_dtype is torch.int8 and example is not None else {}
    for graph in graphs:
        graph.state_dtype = next(name for name, dtype in STATE_DTYPES.items() if dtype is state_dtype)
        graph.state_scale = scales.get(graph)


def _scales(model: nn.Module, graphs: Sequence[FusedGraph], example: Tensor) -> dict[FusedGraph, Tensor]:
    """Return a scale for each node: ``HEADROOM`` times its largest state in the example becomes 127."""
    largest = {graph: graph.values.new_zeros(graph.sources) for graph in graphs}

    def look(graph: FusedGraph, inputs: tuple[Tensor]) -> None:
        found = largest_states(*inputs, graph.sizes, graph.strides, graph.tensors())
        largest[graph] = torch.maximum(largest[graph], found)

    handles = [graph.register_forward_pre_hook(look) for graph in graphs]
    try:
        for images in example.split(8):  # All states of an image are kept at a time.
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {graph: torch.where(found > 0, HEADROOM / 127 * found, 1) for graph, found in largest.items()}
