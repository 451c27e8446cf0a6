"""The base of discrete-time and continuous-time dynamics: one state per node that changes with time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dnw_graph.candidates import CandidateEdges
from dnw_graph.dynamics.dynamics import Dynamics
from dnw_graph.errors import InputError
from dnw_graph.nodes import Nodes
from dnw_graph.propagation import Propagate


class Recurrent(Dynamics):
    """Dynamic neural graph (Section 2.3 of the paper): states Z_v(t), initially the inputs, and zero elsewhere.

    The node function works on all nodes at once, inputs and outputs included, at every time. If its ``forward`` takes a
    second positional argument, it is given the time. An argument with a default counts too, unless its name is
    ``nodes`` or the module is one of PyTorch or PyG. If the function has a method ``send``, states pass through that
    before they are propagated. A strided node function keeps the resolution (Figure 2 of the paper): its result lies in
    the upper left corner of the map, zeros fill the rows below and the columns to the right.
    """

    in_blocks = False
    sets_inputs = False

    def setup(
        self, nodes: Nodes, candidates: CandidateEdges | None, make_function: Callable[[range], nn.Module]
    ) -> CandidateEdges:
        """Build the node function; all pairs of nodes are candidates if none are given.

        Raises:
            InputError: If the candidates do not fit the nodes.
        """
        if candidates is None:
            candidates = CandidateEdges.dynamic(nodes.num_nodes)
        if candidates.num_nodes != nodes.num_nodes:
            raise InputError(f"candidates over {candidates.num_nodes} nodes do not fit {nodes.num_nodes} nodes")
        self.nodes = nodes
        self.build(make_function)
        return candidates

    def build(self, make_function: Callable[[range], nn.Module]) -> None:
        """Build the node function of all nodes."""
        self.node_function = make_function(self.nodes.all)

    def functions(self) -> list[tuple[nn.Module, range]]:
        """Return the node function."""
        return [(self.node_function, self.nodes.all)]

    def step(
        self,
        propagate: Propagate,
        function: nn.Module,
        z: Float[Tensor, "batch have *space"],
        time: Any,
        have: range | None = None,
        want: range | None = None,
        *,
        sends: bool = True,
        call: Callable[..., Tensor] | None = None,
    ) -> Float[Tensor, "batch want *space"]:
        """Return f_θ(A Z, t).

        Args:
            propagate: The product of this forward pass.
            function: The node function.
            z: States of the nodes ``have``.
            time: t.
            have: The nodes of z, the others having the state zero. Default: all.
            want: The nodes requested. Default: all.
            sends: Whether states pass through ``send``; otherwise z is what they send already.
            call: What to call with A Z, if not the node function itself but a method of it.
        """
        sent = z
        send = getattr(function, "send", None) if sends else None
        if send is not None:
            sent = _keep_size(self.compute(function, *((z, have) if have else (z,)), call=send), z)
        received = self.receive(propagate, sent, have or self.nodes.all, want or self.nodes.all)
        arguments = (received, time) if takes_time(function) else (received,)
        nodes: dict[str, Any] = {"nodes": want} if want else {}
        return _keep_size(self.compute(function, *arguments, call=call, **nodes), received)


def takes_time(function: nn.Module) -> bool:
    """Return whether a node function's ``forward`` takes the time, see :class:`Recurrent`."""
    parameters = inspect.signature(function.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2:
        return False
    second = positional[1]
    library = function.forward.__module__.startswith(("torch.", "torch_geometric."))
    return second.default is second.empty or not (library or second.name == "nodes")


def _keep_size(result: Tensor, like: Tensor) -> Tensor:
    """Pad maps that a strided node function made smaller, below and to the right."""
    if result.shape == like.shape:
        return result
    larger = any(got > want for got, want in zip(result.shape, like.shape, strict=False))
    if result.dim() != like.dim() or result.shape[:2] != like.shape[:2] or larger:
        raise InputError(
            f"a node function must keep batch and nodes and not enlarge maps; it made {list(result.shape)} "
            f"of {list(like.shape)}"
        )
    missing = [want - got for want, got in zip(like.shape[2:], result.shape[2:], strict=True)]
    return F.pad(result, [side for amount in reversed(missing) for side in (0, amount)])
