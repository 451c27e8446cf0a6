"""Static dynamics: an acyclic graph, computed block by block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dnw_graph.candidates import CandidateEdges, group_bounds
from dnw_graph.dynamics.base import Dynamics
from dnw_graph.errors import InputError
from dnw_graph.node_functions import NodeFunction, make_node_function
from dnw_graph.propagation import Propagate


class Static(Dynamics):
    """Every node has one state, computed after those of all earlier groups (Equation 1 and Section 2.4 of the paper).

    Z_v = f_θv(Σ w_uv Z_u) group by group; the inputs are Z_v = f_θv(x_v), or x_v with ``input_function=False``.
    """

    def setup(
        self,
        sizes: Sequence[int],
        candidates: CandidateEdges | None,
        node_function: NodeFunction,
        stride: int,
        input_function: bool,
        output_function: bool,
    ) -> CandidateEdges:
        """Build one node function per group and match the candidates' blocks with the groups.

        Raises:
            InputError: If a stride is asked for without a function at the inputs, or the given candidates do not have
                one block per group after the first, fed by whole earlier groups.
        """
        if stride != 1 and not input_function:
            raise InputError(f"stride {stride} belongs to the inputs' node function; set input_function=True")
        last = len(sizes) - 1
        self.node_functions = nn.ModuleList(
            make_node_function(node_function, size, stride if group == 0 else 1)
            if (group > 0 or input_function) and (group < last or output_function)
            else nn.Identity()
            for group, size in enumerate(sizes)
        )
        if candidates is None:
            candidates = CandidateEdges.static(sizes)
        bounds = group_bounds(sizes)
        self._nodes = [range(start, stop) for start, stop in pairwise(bounds)]
        self._source_groups = [self._groups_of(candidates, sizes, number) for number in range(len(candidates.blocks))]
        if len(candidates.blocks) != last:
            raise InputError(f"{last} blocks of candidates are needed for {len(sizes)} groups of nodes")
        return candidates

    @staticmethod
    def _groups_of(candidates: CandidateEdges, sizes: Sequence[int], number: int) -> slice:
        """Return which groups feed block ``number``, whose targets must be group ``number + 1``."""
        bounds = group_bounds(sizes)
        block = candidates.blocks[number]
        targets = range(*bounds[number + 1 : number + 3])
        earlier = bounds[: number + 2]
        if block.targets != targets or block.sources.start not in earlier or block.sources.stop not in earlier:
            raise InputError(
                f"candidates {block.sources} → {block.targets} do not fit groups of {tuple(sizes)} nodes: block "
                f"{number} must lead from whole earlier groups to the nodes {targets}"
            )
        return slice(earlier.index(block.sources.start), earlier.index(block.sources.stop))

    def functions(self) -> list[tuple[nn.Module, range]]:
        """Return one node function per group."""
        return list(zip(self.node_functions, self._nodes, strict=True))

    def forward(self, x: Tensor, propagate: Propagate) -> Tensor:
        """Compute the groups in order and return the last one's states."""
        states = [self.node_functions[0](x)]
        for number, groups in enumerate(self._source_groups):
            sources = states[groups]
            z = sources[0] if len(sources) == 1 else torch.cat(sources, dim=1)
            states.append(self.node_functions[number + 1](propagate(number, z)))
        return states[-1]
