"""Candidate edges: the pairs of nodes that may become edges, as dense blocks over one flat vector of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.nodes import Nodes


@dataclass(frozen=True)
class Block:
    """All pairs of a range of source nodes and a range of target nodes, a dense (targets × sources) matrix.

    Attributes:
        sources: The source nodes, consecutive.
        targets: The target nodes, consecutive.
        offset: Position of the block's first weight in the flat vector.
    """

    sources: range
    targets: range
    offset: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of targets, number of sources."""
        return len(self.targets), len(self.sources)

    @property
    def flat(self) -> slice:
        """The block's part of the flat vector."""
        return slice(self.offset, self.offset + len(self.targets) * len(self.sources))

    def within(
        self, local: Int[Tensor, " edges"], rows: slice, columns: slice
    ) -> tuple[Int[Tensor, " part"], Int[Tensor, " part"]]:
        """Return targets and sources of the edges in a part of the block, counted from the part's corner.

        Args:
            local: Edges, counted from the block's first candidate.
            rows: The targets in the part, counted from the block's first.
            columns: The sources in the part.
        """
        targets = local // self.shape[1]
        sources = local - targets * self.shape[1]
        if (rows.stop - rows.start, columns.stop - columns.start) != self.shape:
            inside = (targets >= rows.start) & (targets < rows.stop)
            inside &= (sources >= columns.start) & (sources < columns.stop)
            targets, sources = targets[inside] - rows.start, sources[inside] - columns.start
        return targets, sources


class RankedWeight:
    """A parameter, or a part of one, that holds candidate weights; here a vector in the order of the candidates."""

    @property
    def parameter(self) -> Tensor:
        """The parameter as the optimiser has it."""
        raise NotImplementedError

    @property
    def holder(self) -> Any:
        """The module with the probe."""
        return self

    @property
    def numel(self) -> int:
        """Number of candidates."""
        return self.parameter.numel()

    @property
    def matrices(self) -> Sequence[tuple[int, int, int]]:
        """First index, rows and columns of each matrix of the weight, in the flattened parameter."""
        raise NotImplementedError

    def flat(self, parameter: Shaped[Tensor, ...]) -> Shaped[Tensor, " candidates"]:
        """Return the weight's part of a tensor of the parameter's shape as a vector; a view where possible."""
        return parameter

    def write(self, flat: Shaped[Tensor, " candidates"], parameter: Shaped[Tensor, ...]) -> None:
        """Set the weight's part of a tensor of the parameter's shape: the inverse of :meth:`flat`."""
        parameter.copy_(flat)

    def positions(self, index: Int[Tensor, " edges"]) -> Int[Tensor, " edges"]:
        """Return the positions of candidates in the flattened parameter."""
        return index


class Probed(nn.Module):
    """A module with a probe, see :mod:`dnw_graph.propagation.gradient`, that moves and converts with it.

    Attributes:
        probe: Accumulates the gradient of all candidates, if a rule requests it.
    """

    probe: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Probed:
        super()._apply(fn, recurse)
        if (probe := self.probe) is not None:
            grad, probe.grad = probe.grad, None
            zero = fn(probe.detach().as_strided((), ()))  # The only number in its storage.
            if zero.is_meta:  # PyTorch replaces the parameter too, and its hooks are gone.
                self.probe = None
            else:
                probe.data = zero.expand(probe.shape)
                probe.grad = None if grad is None else fn(grad)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "probe": None}


def split_index(index: Int[Tensor, " edges"], weights: Sequence[RankedWeight]) -> list[Tensor]:
    """Return the edges in each of several weights, counted from its first candidate.

    Args:
        index: Flat indices among the candidates of all weights, ascending.
        weights: The weights.
    """
    if len(weights) == 1:
        return [index]
    starts = [0, *accumulate(weight.numel for weight in weights)]
    bounds = torch.searchsorted(index.contiguous(), torch.tensor(starts, device=index.device)).tolist()
    return [index[first:last] - start for start, (first, last) in zip(starts, pairwise(bounds), strict=False)]


class CandidateEdges(Probed, RankedWeight):
    """The candidate edges of one graph and their weights.

    The weights are one flat parameter, ordered by block, target and source. Selection thus ranks one vector,
    the optimiser has one parameter per graph, and every block is a view. Flat indices are computed from pairs (u, v),
    and pairs from flat indices, by arithmetic on the blocks' bounds; there is no table of pairs.

    Weights are initialised i.i.d. uniformly in ±1/√S, where S is the number of nodes that can be a source (line 2 of
    the paper's Algorithm 1). The bound is the same in the whole graph, since the ranking compares weights across
    blocks.

    Args:
        blocks: Pairs ``(sources, targets)`` of node ranges. No pair of nodes may occur twice.
        num_nodes: Number of nodes of the graph. Default: one more than the largest node in ``blocks``.

    Shapes:
        - ``weight``: ``[num_candidates]``

    Raises:
        InputError: If there are no candidates, if a range is empty, has a step or exceeds the nodes, or if two blocks
            overlap.

    Examples:
        >>> from dnw_graph import CandidateEdges
        >>> candidates = CandidateEdges.static((2, 3, 1))
        >>> candidates.num_candidates, candidates.num_nodes
        (11, 6)
    """

    @checked
    def __init__(self, blocks: Iterable[tuple[range, range]], num_nodes: int | None = None) -> None:
        super().__init__()
        ranges = [(sources, targets) for sources, targets in blocks]
        if not ranges:
            raise InputError("a graph needs at least one block of candidate edges; none was given")
        largest = max(max(sources.stop, targets.stop) for sources, targets in ranges)
        self.num_nodes = largest if num_nodes is None else num_nodes
        for sources, targets in ranges:
            for nodes in (sources, targets):
                if nodes.step != 1 or not 0 <= nodes.start < nodes.stop <= self.num_nodes:
                    raise InputError(
                        f"block {sources} → {targets}: expected non-empty ranges of step 1 "
                        f"within the {self.num_nodes} nodes"
                    )
        _refuse_overlap(ranges)
        sizes = [len(sources) * len(targets) for sources, targets in ranges]
        offsets = [0, *accumulate(sizes)]
        self.blocks = tuple(Block(s, t, offset) for (s, t), offset in zip(ranges, offsets, strict=False))
        self.num_candidates = offsets[-1]
        self.places = (1,) * len(self.blocks)  # Number of kernel positions per source, by block.
        self.weight = nn.Parameter(torch.empty(self.num_candidates))
        self.reset_parameters()

    @classmethod
    @checked
    def static(cls, sizes: Sequence[int]) -> CandidateEdges:
        """Acyclic: nodes come in groups of the given sizes, and edges lead from any earlier group to any later one.

        Section 2.4 of the paper. One block per group except the first; its sources are all nodes before the group.
        """
        groups = Nodes.in_blocks(sizes).block_ranges
        return cls((range(group.start), group) for group in groups[1:])

    @classmethod
    @checked
    def adjacent(cls, sizes: Sequence[int]) -> CandidateEdges:
        """Layers: edges lead from each group of nodes to the next one only, as with pointwise convolutions."""
        return cls(pairwise(Nodes.in_blocks(sizes).block_ranges))

    @classmethod
    @checked
    def dynamic(cls, num_nodes: int) -> CandidateEdges:
        """All-to-all: every ordered pair of nodes, cycles and self-loops included, in one block."""
        if num_nodes < 1:
            raise InputError(f"a dynamic graph needs at least one node; num_nodes is {num_nodes}")
        return cls([(range(num_nodes), range(num_nodes))])

    @classmethod
    @checked
    def bipartite(cls, num_sources: int, num_targets: int) -> CandidateEdges:
        """A linear layer or 1×1 convolution: every source (nodes 0 … S-1) to every target (nodes S … S+T-1)."""
        return cls.static((num_sources, num_targets))

    @property
    def num_sources(self) -> int:
        """Number of nodes that can be the source of an edge."""
        return sum(len(nodes) for nodes in _union(block.sources for block in self.blocks))

    def reset_parameters(self) -> None:
        """Redraw every weight from the uniform distribution on ±1/√num_sources."""
        bound = 1 / math.sqrt(self.num_sources)
        nn.init.uniform_(self.weight, -bound, bound)

    @property
    def parameter(self) -> Tensor:
        """The weights."""
        return self.weight

    @property
    def matrices(self) -> list[tuple[int, int, int]]:
        """First index, rows and columns of every block."""
        return [(block.offset, *block.shape) for block in self.blocks]

    def block_weight(self, block: Block, weight: Tensor | None = None) -> Float[Tensor, "targets sources"]:
        """View of a block's weights, or of the same part of another flat vector."""
        weight = self.weight if weight is None else weight
        return weight[block.flat].view(block.shape)

    def by_target(self) -> list[list[Block]]:
        """Return the blocks grouped by their targets, so that a group has all candidates into its targets.

        Raises:
            InputError: If the targets of two blocks overlap without being the same.
        """
        groups: dict[range, list[Block]] = {}
        for block in self.blocks:
            groups.setdefault(block.targets, []).append(block)
        if sum(map(len, groups)) > sum(map(len, _union(groups))):
            raise InputError("to rank the candidates into a node, blocks must have the same targets or none in common")
        return list(groups.values())

    @checked
    def pairs(self, index: Int[Tensor, " edges"]) -> Int[Tensor, "2 edges"]:
        """Return the nodes (u, v) of flat indices: row 0 the sources, row 1 the targets.

        Raises:
            InputError: If an index lies outside ``0 … num_candidates - 1``.
        """
        if (index[1:] < index[:-1]).any():
            order = index.argsort()
            pairs: Tensor = self.pairs(index[order])
            return pairs[:, order.argsort()]
        if index.numel() and not 0 <= int(index[0]) <= int(index[-1]) < self.num_candidates:
            raise InputError(
                f"flat indices must lie in 0 … {self.num_candidates - 1}; got {int(index[0])} … {int(index[-1])}"
            )
        ends = torch.tensor([block.flat.stop for block in self.blocks], device=index.device)
        counts = torch.searchsorted(index.contiguous(), ends).diff(prepend=ends.new_zeros(1)).tolist()
        found = index.new_empty((2, len(index)), dtype=torch.long)
        for block, part, into in zip(self.blocks, index.split(counts), found.split(counts, dim=1), strict=True):
            row = (part - block.offset) // len(block.sources)
            into[0] = part + (block.sources.start - block.offset) - row * len(block.sources)
            into[1] = row + block.targets.start
        return found

    @checked
    def flat_index(self, edge_index: Int[Tensor, "2 edges"]) -> Int[Tensor, " edges"]:
        """Return the flat indices of pairs (u, v): the inverse of :meth:`pairs`.

        Raises:
            InputError: If a pair is not a candidate; the message names the first such pair.
        """
        u, v = edge_index
        index = torch.full_like(u, -1)
        for block in self.blocks:
            inside = (u >= block.sources.start) & (u < block.sources.stop)
            inside &= (v >= block.targets.start) & (v < block.targets.stop)
            flat = block.offset + (v - block.targets.start) * len(block.sources) + (u - block.sources.start)
            index = torch.where(inside, flat, index)
        if index.numel() and int(index.min()) < 0:
            first = int(torch.nonzero(index < 0)[0])
            raise InputError(f"({int(u[first])}, {int(v[first])}) is not a candidate edge of this graph")
        return index

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"nodes={self.num_nodes}, candidates={self.num_candidates:,}, blocks={len(self.blocks)}"


def _union(ranges: Iterable[range]) -> list[range]:
    """Merge ranges of step 1 that touch or overlap."""
    merged: list[range] = []
    for nodes in sorted(ranges, key=lambda nodes: nodes.start):
        if merged and nodes.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, nodes.stop))
        else:
            merged.append(nodes)
    return merged


def _refuse_overlap(ranges: list[tuple[range, range]]) -> None:
    for i, (sources, targets) in enumerate(ranges):
        for other_sources, other_targets in ranges[:i]:
            common_source = max(sources.start, other_sources.start) < min(sources.stop, other_sources.stop)
            common_target = max(targets.start, other_targets.start) < min(targets.stop, other_targets.stop)
            if common_source and common_target:
                raise InputError(
                    f"blocks {other_sources} → {other_targets} and {sources} → {targets} share candidate edges"
                )
