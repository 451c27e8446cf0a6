"""The nodes of a graph: how many, and which are inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dnw_graph.arguments import checked, require


def reaching(
    edge_index: Int[Tensor, "2 edges"],
    wanted: Bool[Tensor, " nodes"],
    widen: Callable[[Bool[Tensor, " nodes"]], object] | None = None,
) -> Bool[Tensor, " nodes"]:
    """Return the nodes from which a directed path of edges leads to a wanted one, these included.

    Args:
        edge_index: The edges, row 0 the sources, row 1 the targets.
        wanted: The nodes to reach.
        widen: Adds, in place, nodes that others need; its argument is a tensor on the CPU.
    """
    # NumPy looks up masks several times faster than PyTorch, and a device would wait for the host in every round.
    found, count = wanted.to("cpu", copy=True), -1
    live, (source, target) = found.numpy(), edge_index.cpu().numpy()
    while (now := int(live.sum())) != count:
        count = now
        live[source[live[target]]] = True
        if widen is not None:
            widen(found)
        rest = ~live[source]
        source, target = source[rest], target[rest]
    return found.to(wanted.device)


@dataclass(frozen=True)
class Nodes:
    """Nodes in blocks of consecutive numbers; the first are the inputs, the last the outputs.

    Attributes:
        blocks: Number of nodes of each block.
        num_inputs: Number of input nodes.
        num_outputs: Number of output nodes.
    """

    blocks: tuple[int, ...]
    num_inputs: int
    num_outputs: int

    @classmethod
    @checked
    def in_blocks(cls, blocks: Sequence[int]) -> Nodes:
        """Nodes whose first block are the inputs and whose last block are the outputs.

        Raises:
            InputError: If there are fewer than two blocks or one is empty.
        """
        sizes = tuple(blocks)
        require(len(sizes) >= 2 and min(sizes) >= 1, "blocks", "two or more positive integers", sizes)
        return cls(sizes, sizes[0], sizes[-1])

    @classmethod
    @checked
    def flat(cls, num_nodes: int, num_inputs: int, num_outputs: int) -> Nodes:
        """Nodes of a dynamic graph. Inputs and outputs may overlap, as in a neural ODE without further nodes.

        Raises:
            InputError: If there are no inputs or outputs, or more than there are nodes.
        """
        for kind, number in (("num_inputs", num_inputs), ("num_outputs", num_outputs)):
            require(1 <= number <= num_nodes, kind, f"in 1 … num_nodes = {num_nodes}", number)
        inner = num_nodes - num_inputs - num_outputs
        blocks = (num_nodes,) if inner < 0 else tuple(n for n in (num_inputs, inner, num_outputs) if n)
        return cls(blocks, num_inputs, num_outputs)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return sum(self.blocks)

    @property
    def all(self) -> range:
        """All nodes."""
        return range(self.num_nodes)

    @property
    def inputs(self) -> range:
        """The input nodes."""
        return range(self.num_inputs)

    @property
    def outputs(self) -> range:
        """The output nodes."""
        return range(self.num_nodes - self.num_outputs, self.num_nodes)

    @property
    def block_ranges(self) -> list[range]:
        """The nodes of each block."""
        return [range(start, stop) for start, stop in pairwise([0, *accumulate(self.blocks)])]

    def attributes(self) -> dict[str, Tensor]:
        """Return the node attributes of ``to_data``: ``block``, ``pos``, ``input_mask`` and ``output_mask``.

        The position is x the block, y the index within it, both in 0 … 1.
        """
        sizes = torch.tensor(self.blocks, device="cpu")
        block = torch.repeat_interleave(sizes)
        place = torch.cat([(torch.arange(size, device="cpu") + 0.5) / size for size in self.blocks])
        node = torch.arange(self.num_nodes, device="cpu")
        return {
            "block": block,
            "pos": torch.stack([block / max(1, len(sizes) - 1), place], dim=1),
            "input_mask": node < self.num_inputs,
            "output_mask": node >= self.num_nodes - self.num_outputs,
        }
