"""Static dynamics: an acyclic graph, computed block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dnw_graph.candidates import CandidateEdges
from dnw_graph.dynamics.dynamics import Dynamics
from dnw_graph.errors import InputError
from dnw_graph.nodes import Nodes
from dnw_graph.propagation import Propagate


class Static(Dynamics):
    """Every node has one state, computed after those of all earlier blocks (Equation 1 and Section 2.4 of the paper).

    Z_v = f_θv(Σ w_uv Z_u) block by block; the inputs are Z_v = f_θv(x_v), or x_v with ``input_function=False``. A node
    function may change the size of the maps only at inputs and outputs.
    """

    in_blocks = True

    def setup(
        self, nodes: Nodes, candidates: CandidateEdges | None, make_function: Callable[[range], nn.Module]
    ) -> CandidateEdges:
        """Build one node function per block of nodes and match the blocks of candidates with them.

        Raises:
            InputError: If the given candidates do not have one block per block of nodes after the first, fed by whole
                earlier blocks of nodes.
        """
        self.node_functions = nn.ModuleList(map(make_function, nodes.block_ranges))
        self.nodes = nodes
        last = len(nodes.blocks) - 1
        if candidates is None:
            candidates = CandidateEdges.static(nodes.blocks)
        if len(candidates.blocks) != last:
            raise InputError(f"{last} blocks of candidates are needed for {last + 1} blocks of nodes")
        self._feeding = [_feeding_blocks(candidates, nodes, number) for number in range(last)]
        return candidates

    def functions(self) -> list[tuple[nn.Module, range]]:
        """Return one node function per block."""
        return list(zip(self.node_functions, self.nodes.block_ranges, strict=True))

    def forward(self, x: Tensor, propagate: Propagate, **options: Any) -> Tensor:
        """Compute the blocks in order and return the last one's states."""
        if options:
            raise InputError(f"{self.name}: a static graph takes no options; got {', '.join(options)}")
        states = propagate.start(self._feeding)
        z = x
        for block, function in enumerate(self.node_functions):
            received = states.receive(block - 1, z) if block else x
            z = self.compute(function, received)
            self._check(block, z, received)
        return z

    def _check(self, block: int, z: Tensor, received: Tensor) -> None:
        """Refuse states whose shape does not match those of other blocks."""
        if z.shape == received.shape:
            return
        ends = block in (0, len(self.node_functions) - 1)
        kept = slice(2) if ends else slice(None)
        if z.shape[kept] != received.shape[kept]:
            expected = ", ".join([*map(str, received.shape[kept]), *(["…"] if ends else [])])
            raise InputError(
                f"{self.name}: the node function of block {block} gave states of shape {list(z.shape)}; expected "
                f"[{expected}], since all blocks need the same batch and maps of one size"
            )


def _feeding_blocks(candidates: CandidateEdges, nodes: Nodes, number: int) -> slice:
    """Return which blocks of nodes feed block ``number`` of the candidates, whose targets are the next block."""
    ranges = nodes.block_ranges
    block = candidates.blocks[number]
    bounds = [nodes.start for nodes in ranges[: number + 2]]
    if block.targets != ranges[number + 1] or {block.sources.start, block.sources.stop} - set(bounds):
        raise InputError(
            f"candidates {block.sources} → {block.targets} do not fit blocks of {nodes.blocks} nodes: block {number} "
            f"must lead from whole earlier blocks to the nodes {ranges[number + 1]}"
        )
    return slice(bounds.index(block.sources.start), bounds.index(block.sources.stop))
