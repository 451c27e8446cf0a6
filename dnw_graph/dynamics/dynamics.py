"""The interface of a dynamics: how states follow from one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.candidates import CandidateEdges
from dnw_graph.dynamics.recompute import recomputed
from dnw_graph.nodes import Nodes
from dnw_graph.propagation import Propagate


class Dynamics(nn.Module):
    """How the states of all nodes follow from the inputs, given propagation and node functions.

    One object serves one graph: it owns the graph's node functions.

    Attributes:
        name: Name of the graph, for messages; set by the graph.
        recompute: Whether node functions are recomputed in the backward pass; set by the graph.
        node_dim: The dimension of an input that counts the input nodes.
        sets_inputs: Whether the states of the input nodes are given, whatever edges lead to them; except, in dynamics
            with several steps, after the last one.
        in_blocks: Whether the graph is defined by blocks of nodes, rather than by numbers of nodes, inputs and outputs.
    """

    name: str = "graph"
    recompute: bool = False
    node_dim: int = 1
    sets_inputs: bool = True
    in_blocks: ClassVar[bool]

    def setup(
        self, nodes: Nodes, candidates: CandidateEdges | None, make_function: Callable[[range], nn.Module]
    ) -> CandidateEdges:
        """Build the node functions and return the candidate edges.

        Args:
            nodes: The nodes of the graph.
            candidates: The user's candidates, or None for all that the dynamics allows.
            make_function: Returns the user's node function for some nodes.
        """
        raise NotImplementedError

    def functions(self) -> list[tuple[nn.Module, range]]:
        """Return the node functions, each with its nodes."""
        raise NotImplementedError

    def forward(self, x: Tensor, propagate: Propagate, **options: Any) -> Any:
        """Return the states of the output nodes.

        Args:
            x: The inputs of the input nodes, ``[batch, inputs, *space]``.
            propagate: The product Z → I over the real edges of this forward pass.
            options: Further options of the dynamics.
        """
        raise NotImplementedError

    def compute(
        self, function: nn.Module, *arguments: Any, call: Callable[..., Tensor] | None = None, **keywords: Any
    ) -> Tensor:
        """Call a node function; with ``recompute``, the backward pass recomputes it (activation checkpointing).

        Args:
            function: The node function.
            arguments: Arguments of the call.
            call: What to call, if not the node function itself but a method of it such as ``send``.
            keywords: Further arguments of the call.
        """
        call = function if call is None else call
        keeps = torch.is_grad_enabled() and not isinstance(function, nn.Identity)
        # A compiler decides itself what to recompute.
        if self.recompute and keeps and not torch.compiler.is_compiling():
            return recomputed(function, call, *arguments, **keywords)
        return call(*arguments, **keywords)

    def receive(
        self, propagate: Propagate, z: Float[Tensor, "batch have *space"], have: range, want: range
    ) -> Float[Tensor, "batch want *space"]:
        """Return what some nodes receive from others, over all blocks of candidates.

        Args:
            propagate: The product of this forward pass.
            z: States of the nodes ``have``; all others must have the state zero.
            have: The nodes of z.
            want: The nodes requested.
        """
        total: Tensor | None = None
        for number, block in enumerate(propagate.blocks):
            sources, targets = _common(block.sources, have), _common(block.targets, want)
            if not sources or not targets:
                continue
            # Lengths: the compiler of PyTorch 2.8 cannot compare ranges.
            part = z if len(sources) == len(have) else z[:, sources.start - have.start : sources.stop - have.start]
            received = propagate(number, part, sources, targets)
            if total is None and len(targets) == len(want):
                total = received
                continue
            if total is None:
                total = received.new_zeros(z.size(0), len(want), *z.shape[2:])
            # Out of place: the product's backward pass may need its result unchanged.
            padding = (*[0, 0] * (z.dim() - 2), targets.start - want.start, want.stop - targets.stop)
            total = total + nn.functional.pad(received, padding)
        return z.new_zeros(z.size(0), len(want), *z.shape[2:]) if total is None else total


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))
