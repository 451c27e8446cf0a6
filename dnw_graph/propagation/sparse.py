"""Sparse propagation: products over the real edges alone, by compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dnw_graph.arguments import checked
from dnw_graph.candidates import Block
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.ops.call import readable
from dnw_graph.ops.csr import by_source, product_of_pieces, sampled, sampled_matrix
from dnw_graph.ops.dense import product_with_transpose
from dnw_graph.ops.layout import batch_last, detach_view, kernels_take, traced
from dnw_graph.ops.operands import first_order
from dnw_graph.propagation.gradient import unrestricted_weights
from dnw_graph.propagation.propagate import Propagate, Propagation, RealEdges, States

CANDIDATE_GRADIENTS = ("exact", "bfloat16")


class SparsePropagation(Propagation):
    """Sparse products on the CPU for outputs and for gradients of states, dense products for gradients of candidates.

    States are node-major with the images last, ``[nodes, *space, batch]`` in memory. A product over the edges then sums
    long rows, in tiles that stay in cache; the gradient of a block's candidates is one dense product per block of
    sources, without a copy; and the node functions of this package run as one compiled pass. If few candidates get a
    gradient (:class:`~dnw_graph.RandomGraph`, :class:`~dnw_graph.TopKAST`, …; up to a twelfth of all), only theirs are
    computed.

    Args:
        candidate_gradient: How the dense products are computed: ``"exact"``, in the dtype of the states, or
            ``"bfloat16"``: from float32 states and gradients rounded to bfloat16, with sums in float32 and results
            rounded to bfloat16. This is faster on processors with such products (AVX512-BF16, AMX); others compute the
            same without a gain. Forward pass and gradients of states stay exact.

    Raises:
        InputError: If ``candidate_gradient`` is neither. In the forward pass, if the weights are not float32 or float64
            (float32 for ``"bfloat16"``) on a CPU, or if it is traced or transformed. In the backward pass, for double
            backward and vectorised gradients.
    """

    @checked
    def __init__(self, candidate_gradient: str = "exact") -> None:
        super().__init__()
        if candidate_gradient not in CANDIDATE_GRADIENTS:
            raise unknown_name("candidate_gradient", candidate_gradient, CANDIDATE_GRADIENTS)
        self.candidate_gradient = candidate_gradient

    def extra_repr(self) -> str:
        """Options, for ``repr``."""
        return "" if self.candidate_gradient == "exact" else f"candidate_gradient={self.candidate_gradient!r}"

    def forward(self, edges: RealEdges, x: Tensor) -> Propagate:
        """Split the ascending flat indices into edges by block."""
        if traced():
            raise InputError(
                "propagation='sparse' calls kernels that cannot be traced or transformed; use propagation='auto'"
            )
        weight = edges.weight
        if not kernels_take(weight) or not readable(x):
            raise InputError(
                f"propagation='sparse' takes weights in float32 or float64 on a CPU; got {weight.dtype} on "
                f"{weight.device}: use propagation='auto'"
            )
        rounded = self.candidate_gradient == "bfloat16"
        if rounded and weight.dtype != torch.float32:
            raise InputError(
                f"candidate_gradient='bfloat16' takes a graph in float32; got {weight.dtype}: use "
                "candidate_gradient='exact'"
            )
        return _Sparse(edges, edges.split(unrestricted_weights(edges)), rounded)


class _Sparse(Propagate):
    """Products over the real edges of parts of blocks, each converted to CSR once."""

    first_order = True

    def __init__(self, edges: RealEdges, weights: list[Tensor], rounded: bool) -> None:
        super().__init__(edges, weights)
        self.rounded = rounded
        self.parts: dict[tuple[int, int, int, int, int], _Part] = {}

    def product(self, number: int, z: Tensor, rows: slice, columns: slice) -> Tensor:
        key = (number, rows.start, rows.stop, columns.start, columns.stop)
        if key not in self.parts:
            self.parts[key] = _part(self.edges, number, rows, columns)
        return _Product.apply(batch_last(z), self.weights[number][rows, columns], *self.parts[key], self.rounded)

    def arrange(self, x: Tensor) -> Tensor:
        return batch_last(x)

    def start(self, feeding: Sequence[slice]) -> States:
        return _States(_Pass(self.edges, feeding, self.rounded))


@dataclass(frozen=True)
class _Adjacency:
    """Real edges in CSR, by target. Their weights are constants here; the gradient goes to the candidates."""

    rowptr: Int[Tensor, " rows"]
    columns: Int[Tensor, " edges"]
    values: Float[Tensor, " edges"]
    num_sources: int

    @cached_property
    def by_source(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return Aᵀ in CSR and the order of its edges."""
        starts, order = by_source(self.rowptr, self.columns, self.num_sources)
        return starts, self.targets[order], self.values[order], order

    @property
    def targets(self) -> Int[Tensor, " edges"]:
        """Return the target of every edge."""
        return torch.repeat_interleave(self.rowptr.diff(), output_size=len(self.columns))


_Part = tuple[_Adjacency, tuple[Tensor, Tensor] | None]


def _adjacency(targets: Tensor, sources: Tensor, values: Tensor, shape: tuple[int, int]) -> _Adjacency:
    """Return the edges in CSR; they must be sorted by target."""
    rowptr = torch.searchsorted(targets, torch.arange(shape[0] + 1, device=targets.device))
    return _Adjacency(rowptr, sources, values, shape[1])


def _part(edges: RealEdges, number: int, rows: slice, columns: slice) -> _Part:
    """Return the edges of a part of a block, and the candidates in ``sampled``, counted from the part's corner."""
    block: Block = edges.candidates.blocks[number]
    targets, sources = block.within(edges.local[number], rows, columns)
    weight = edges.candidates.block_weight(block, edges.weight.detach())[rows, columns]
    adjacency = _adjacency(targets, sources, weight[targets, sources], (weight.size(0), weight.size(1)))
    sampled = None if edges.sampled is None else block.within(edges.local_sampled[number], rows, columns)
    return adjacency, sampled


class _Product(torch.autograd.Function):
    """I = A Z, with the gradient of the states, and that of every candidate or of some of them."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        adjacency: _Adjacency,
        sampled: tuple[Tensor, Tensor] | None,
        rounded: bool,
    ) -> Tensor:
        ctx.adjacency, ctx.sampled, ctx.rounded = adjacency, sampled, rounded
        ctx.save_for_backward(z)
        received = product_of_pieces([_rows(z)], adjacency.rowptr, adjacency.columns, adjacency.values)
        return detach_view(_maps(received, z))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (z,) = ctx.saved_tensors
        adjacency: _Adjacency = ctx.adjacency
        received_grad = _rows(batch_last(grads[0]))
        z_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            starts, targets, values, _ = adjacency.by_source
            z_grad = _maps(product_of_pieces([received_grad], starts, targets, values), z)
        if ctx.needs_input_grad[1] and ctx.sampled is None:
            factors = (_factor(each, ctx.rounded) for each in (received_grad, _rows(z)))
            weight_grad = product_with_transpose(*factors).to(z.dtype)
        elif ctx.needs_input_grad[1]:
            weight_grad = sampled_matrix(received_grad, _rows(z), *ctx.sampled)
        return z_grad, weight_grad, None, None, None


class _States(States):
    """The states of a static graph's blocks, whose products form a chain.

    The backward pass of a block thus follows those of all later blocks, when all gradients that it needs are known;
    autograd never sums gradients of several blocks.
    """

    def __init__(self, common: _Pass) -> None:
        self.common = common
        self.chain: Tensor = unrestricted_weights(common.edges)

    def receive(self, number: int, z: Tensor) -> Tensor:
        """Return the inputs of the next block, from all blocks that feed it."""
        received, self.chain = _Receive.apply(batch_last(z), self.chain, self.common, number)
        return received


class _Pass:
    """State shared by the products of one forward pass and its backward pass."""

    def __init__(self, edges: RealEdges, feeding: Sequence[slice], rounded: bool) -> None:
        self.edges, self.feeding, self.rounded = edges, feeding, rounded
        blocks = edges.candidates.blocks
        self.starts = [0, *(block.targets.start for block in blocks), blocks[-1].targets.stop]
        self.adjacency = self.of_all_blocks(edges.index, edges.local)
        self.z: list[Tensor] = []
        self.begin()

    def begin(self) -> None:
        """Discard the results of an earlier backward pass."""
        self.received_grads: dict[int, Tensor | None] = {}
        # The same gradients as factors of the candidate gradient, and the pixels that they are of; None: all.
        self.factors: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.weight_grad: Tensor | None = None

    def take(self, number: int, grad: Tensor | None, batch: int) -> None:
        """Store the gradient of the inputs of one block's targets."""
        self.received_grads[number] = grad
        if grad is not None and self.edges.sampled is None:
            pixels = _few_pixels(grad, batch)
            self.factors[number] = _factor(_at_pixels(grad, pixels, batch), self.rounded), pixels

    @cached_property
    def sampled(self) -> _Adjacency:
        """The candidates in ``sampled``."""
        index = self.edges.sampled
        assert index is not None
        same = index is self.edges.index
        return self.adjacency if same else self.of_all_blocks(index, self.edges.local_sampled)

    def of_all_blocks(self, index: Tensor, local: Sequence[Tensor]) -> _Adjacency:
        """Return candidates of all blocks, with nodes numbered over the whole graph."""
        targets, sources = [], []
        for part, block in zip(local, self.edges.candidates.blocks, strict=True):
            rows, columns = block.within(part, slice(0, block.shape[0]), slice(0, block.shape[1]))
            targets.append(rows + block.targets.start)
            sources.append(columns + block.sources.start)
        # A block's targets follow those of the previous block.
        size = (self.starts[-1], self.starts[-1])
        return _adjacency(torch.cat(targets), torch.cat(sources), self.edges.weight.detach()[index], size)

    def edges_of(self, rowptr: Tensor, block: int) -> tuple[Tensor, slice]:
        """Return the row pointers of a block's nodes, counted from their first edge, and their edges."""
        own = rowptr[self.starts[block] : self.starts[block + 1] + 1]
        first, last = own[[0, -1]].tolist()
        return own - first, slice(first, last)

    def compute(self, number: int, z: Tensor) -> Tensor:
        """Return the product for the targets of one block of candidates."""
        self.z.append(_rows(z.detach()))
        rowptr, own = self.edges_of(self.adjacency.rowptr, number + 1)
        received = product_of_pieces(self.z, rowptr, self.adjacency.columns[own], self.adjacency.values[own])
        if number == len(self.feeding) - 1:
            self.z = []  # From now on each product stores its own states.
        return _maps(received, z)

    def gradient_of_states(self, number: int, z: Tensor) -> Tensor:
        """Return the gradient of a block's states, summed over all blocks that they feed."""
        starts, targets, values, _ = self.adjacency.by_source
        rowptr, own = self.edges_of(starts, number)
        pieces = self.gradients_after(number, z)
        received = product_of_pieces(pieces, rowptr, targets[own] - self.starts[number + 1], values[own])
        return _maps(received, z)

    def gradients_after(self, number: int, z: Tensor) -> list[Tensor]:
        """Return the gradients of the inputs of all nodes after block ``number``."""
        features = z.numel() // z.size(1)
        later = range(number, len(self.feeding))
        sizes = [self.starts[each + 2] - self.starts[each + 1] for each in later]
        known = [self.received_grads.get(each) for each in later]
        return [z.new_zeros(size, features) if grad is None else grad for size, grad in zip(sizes, known, strict=True)]

    def gradient_of_weights(self, number: int, z: Tensor) -> None:
        """Write the gradient of all candidates that lead from a block's nodes."""
        weight, index = self.edges.weight, self.edges.sampled
        if self.weight_grad is None:
            # A backward pass from the outputs writes to all candidates; one from inner states writes to some of them.
            complete = number == len(self.feeding) - 1 and index is None
            self.weight_grad = torch.empty_like(weight) if complete else torch.zeros_like(weight)
        if index is not None:
            starts, targets, _, order = self.sampled.by_source
            rowptr, own = self.edges_of(starts, number)
            pieces = self.gradients_after(number, z)
            gradient = sampled(pieces, rowptr, targets[own] - self.starts[number + 1], _rows(z))
            self.weight_grad[index[order[own]]] = gradient
            return
        rows = _factor(_rows(z), self.rounded)
        for later in range(number, len(self.feeding)):
            block = self.edges.candidates.blocks[later]
            first = self.starts[number] - block.sources.start
            if first < 0 or self.starts[number] >= block.sources.stop:
                continue
            part = self.edges.candidates.block_weight(block, self.weight_grad)[:, first : first + z.size(1)]
            if later in self.factors:
                grad, pixels = self.factors[later]
                product_with_transpose(grad, _at_pixels(rows, pixels, z.size(0)), out=part)
            else:
                part.zero_()


class _Receive(torch.autograd.Function):
    """The product of one block. Its second argument and result link the products in a chain, from the weights on."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, chain: Tensor, common: _Pass, number: int) -> tuple[Tensor, Tensor]:
        ctx.common, ctx.number = common, number
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z)
        return detach_view(common.compute(number, z)), chain.new_empty(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        (z,) = ctx.saved_tensors
        common: _Pass = ctx.common
        number: int = ctx.number
        if grads[1] is None:
            # A backward pass begins: no later block has been processed.
            common.begin()
        common.take(number, None if grads[0] is None else _rows(batch_last(grads[0])), z.size(0))
        if common.edges.weight.requires_grad:
            common.gradient_of_weights(number, z)
        z_grad = common.gradient_of_states(number, z) if ctx.needs_input_grad[0] else None
        if number > 0:
            return z_grad, z.new_empty(0), None, None
        weight_grad = common.weight_grad
        common.begin()
        return z_grad, weight_grad, None, None


def _factor(rows: Tensor, rounded: bool) -> Tensor:
    """Return rows as a factor of the candidate gradient."""
    return rows.bfloat16() if rounded else rows


def _few_pixels(rows: Tensor, batch: int) -> Tensor | None:
    """Return the pixels at which rows are not all zero, if those are half of them or fewer; None otherwise.

    A read-out that looks at a patch of the maps gives such gradients. The corners tell most others at once.
    """
    maps = rows.view(len(rows), -1, max(batch, 1))
    if maps[:, :1].any() or maps[:, -1:].any():
        return None
    pixels = maps.any(2).any(0).nonzero().flatten()
    return pixels if 2 * len(pixels) <= maps.size(1) else None


def _at_pixels(rows: Tensor, pixels: Tensor | None, batch: int) -> Tensor:
    """Return rows with the given pixels only, or all."""
    if pixels is None:
        return rows
    return rows.view(len(rows), -1, max(batch, 1)).index_select(1, pixels).flatten(1)


def _rows(z: Tensor) -> Tensor:
    """Return states ``[batch, nodes, *space]`` with the images last in memory as a matrix, one row per node."""
    return z.movedim(0, -1).flatten(1)


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows as states with space and batch like others."""
    return rows.view(len(rows), *like.shape[2:], like.size(0)).movedim(-1, 0)
