"""NeuralGraph: candidates, wiring, node functions, dynamics and propagation in one module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dnw_graph._compat import import_pyg
from dnw_graph.arguments import checked, fits, refuse_replica, require, wrong
from dnw_graph.candidates import CandidateEdges
from dnw_graph.dynamics import Dynamics, Static, make_dynamics
from dnw_graph.errors import InputError
from dnw_graph.node_functions import NodeFunction, NormReluConv, make_node_function
from dnw_graph.nodes import Nodes, reaching
from dnw_graph.propagation import Propagation, RealEdges, make_propagation
from dnw_graph.ranking import Ranking
from dnw_graph.wirings import Fixed, RandomGraph, Wiring, wiring_name
from dnw_graph.wirings.prune_and_grow import PruneAndGrow

if TYPE_CHECKING:
    import torch_geometric.data


class NeuralGraph(Ranking):
    r"""A graph of single channels that learns its own edges.

    Each node holds one feature map per image and each edge carries a weight:

    .. math:: I_v = \sum_{(u,v) \in E} w_{uv} Z_u, \qquad Z_v = f_{\theta_v}(I_v)

    (Equations 1 and 2 of the paper). The wiring chooses the real edges E among all candidates: for ``"dnw"`` the
    ``num_edges`` of largest :math:`|w_{uv}|`, and every candidate gets the gradient
    :math:`\langle Z_u, \partial L / \partial I_v \rangle` (Algorithm 1). The dynamics determines how states are
    computed: block by block (static), step by step (discrete), or as the solution of an ODE (continuous).

    In training the real edges are chosen once per forward pass. In evaluation they are chosen after a switch from
    training, after ``load_state_dict``, and when the weights have changed, also by a fused optimiser or through
    ``.data``. Writing a few weights of a large graph through ``.data`` may go unnoticed: call
    :meth:`~dnw_graph.ranking.Ranking.update_wiring` then.

    Args:
        blocks: Static graphs: number of nodes of each block; the first are the inputs, the last the outputs.
        num_edges: Number of real edges k. Default: that of a :class:`~dnw_graph.Fixed` wiring, else all candidates.
        num_nodes: Dynamic graphs: number of nodes.
        num_inputs: Dynamic graphs: number of input nodes, the first ones.
        num_outputs: Dynamic graphs: number of output nodes, the last ones.
        wiring: Rule that chooses the real edges: a name (``"dnw"``, ``"random_graph"``, ``"no_update"``,
            ``"set"``, ``"rigl"``, ``"complete"``, …), ``"package.module.Class"``, or a
            :class:`~dnw_graph.wirings.Wiring`, which is copied.
        node_function: The function f_θ of the nodes: a name, a module or a factory ``(num_nodes, stride)``; see
            :mod:`dnw_graph.node_functions`.
        dynamics: How states are computed: ``"static"``, ``"continuous"`` or a
            :class:`~dnw_graph.dynamics.Dynamics` such as ``Discrete(steps=5)``, which is copied.
        propagation: How I is computed: ``"auto"``, ``"block"``, ``"message_passing"`` or a
            :class:`~dnw_graph.propagation.Propagation`.
        stride: Stride of the node function: at the inputs of a static graph, at every node of a dynamic one.
        input_function: Static graphs: whether the node function is applied at the inputs.
        output_function: Static graphs: whether the node function is applied at the outputs.
        candidates: The candidate edges, which are copied with their weights. Default: all that the dynamics allows.
        recompute: Recompute the node functions in the backward pass (activation checkpointing): less memory, more time,
            the same outputs and gradients.
        name: Name of the graph, for messages and tables.

    Shapes:
        - input: ``[batch, inputs, height, width]``, or ``[batch, inputs]`` with a node function for vectors
        - output: ``[batch, outputs, ⌈height / stride⌉, ⌈width / stride⌉]``; dynamic graphs keep the resolution

    Raises:
        InputError: If ``num_edges`` is not in 1 … number of candidates, a name is unknown, the numbers of nodes are
            invalid, an input has the wrong shape, or a user's wiring or node function returns an invalid result.

    Examples:
        >>> import torch
        >>> from dnw_graph import NeuralGraph
        >>> graph = NeuralGraph(blocks=(64, 128, 128), num_edges=1244)
        >>> graph(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 128, 8, 8])
        >>> graph.edge_index.shape
        torch.Size([2, 1244])
    """

    @checked
    def __init__(
        self,
        blocks: Sequence[int] | None = None,
        num_edges: int | None = None,
        *,
        num_nodes: int | None = None,
        num_inputs: int | None = None,
        num_outputs: int | None = None,
        wiring: str | Wiring = "dnw",
        node_function: NodeFunction = "norm_relu_conv",
        dynamics: str | Dynamics = "static",
        propagation: str | Propagation = "auto",
        stride: int = 1,
        input_function: bool = True,
        output_function: bool = False,
        candidates: CandidateEdges | None = None,
        recompute: bool = False,
        name: str = "graph",
    ) -> None:
        super().__init__(name)
        require(stride >= 1, f"{name}: stride", "an integer >= 1", stride)
        self.dynamics = make_dynamics(dynamics)
        self.dynamics.name = name
        self.dynamics.recompute = recompute
        self.nodes = _make_nodes(self.dynamics, blocks, num_nodes, num_inputs, num_outputs)
        _check_ends(self.dynamics, stride, input_function, output_function)

        def make_function(nodes: range) -> nn.Module:
            ends = ((self.nodes.inputs, input_function), (self.nodes.outputs, output_function))
            if self.dynamics.in_blocks and (nodes, False) in ends:
                return nn.Identity()
            return make_node_function(node_function, len(nodes), 1 if nodes.start else stride)

        self.candidates = self.dynamics.setup(self.nodes, copy.deepcopy(candidates), make_function)
        self._takes_maps = any(isinstance(function, NormReluConv) for function, _ in self.dynamics.functions())
        self.take(self.prepare(wiring, num_edges))
        self.propagation = make_propagation(propagation)

    @property
    def weights(self) -> tuple[CandidateEdges]:  # type: ignore[override]
        """The candidate weights."""
        return (self.candidates,)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of nodes of each block; in a dynamic graph the blocks are inputs, inner nodes and outputs."""
        return self.nodes.blocks

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.nodes.num_nodes

    @property
    def num_inputs(self) -> int:
        """Number of input nodes, the first ones."""
        return self.nodes.num_inputs

    @property
    def num_outputs(self) -> int:
        """Number of output nodes, the last ones."""
        return self.nodes.num_outputs

    @property
    def edge_index(self) -> Int[Tensor, "2 edges"]:
        """The real edges now: row 0 the sources, row 1 the targets."""
        return self.candidates.pairs(self.real_index)

    def forward(self, x: Float[Tensor, "batch ..."], **options: Any) -> Float[Tensor, "batch ..."]:
        """Return the states of the output nodes.

        Args:
            x: Inputs of the input nodes.
            options: Options of the dynamics: ``return_states=True`` for a discrete graph, ``times=…`` for a continuous
                one.
        """
        refuse_replica(self)
        dynamics, weight = self.dynamics, self.candidates.weight
        dim = dynamics.node_dim
        if not self._fits(x, dim, weight):
            raise self._wrong_input(x)
        tensors = (weight,)
        index = self.real_edges(tensors)
        learning = self.learning_edges(index, tensors)
        values = self.guarded(self.wiring.values(weight))
        edges = RealEdges(self.candidates, index, values, learning, self.candidates.probe)
        propagate = self.propagation(edges, x)
        autocast: Any = nullcontext()
        if propagate.first_order and torch.is_autocast_enabled("cpu"):
            # On a CPU kernels in float32 are faster than PyTorch's operators in bfloat16.
            autocast, x = torch.autocast("cpu", enabled=False), x.to(weight.dtype)
        with autocast:
            return dynamics(propagate.arrange(x) if dim == 1 else x, propagate, **options)

    def _fits(self, x: Tensor, dim: int, weight: Tensor) -> bool:
        """Return whether an input is valid; called in every forward pass."""
        dims = x.dim() if fits(x, weight) else 0
        right = dims == dim + 3 if self._takes_maps else dims > dim
        return right and bool(x.shape[dim] == self.nodes.num_inputs)  # a tensor under torch.jit.trace

    def _wrong_input(self, x: object) -> InputError:
        weight = self.candidates.weight
        time = "time, " if self.dynamics.node_dim == 2 else ""
        kind = str(weight.dtype).removeprefix("torch.")
        return wrong(
            f"{self.name}: the input",
            f"a tensor of {kind} [batch, {time}{self.num_inputs}, {'height, width' if self._takes_maps else '…'}] on "
            f"{weight.device}, one map or value per input node",
            x,
        )

    def reset_parameters(self) -> None:
        """Redraw the candidate weights, and reset the wiring."""
        self.candidates.reset_parameters()
        self.set_up_anew()

    @checked
    def live_nodes(
        self, live_outputs: Bool[Tensor, " outputs"] | None = None, real_index: Int[Tensor, " edges"] | None = None
    ) -> Bool[Tensor, " nodes"]:
        """Return which nodes reach an output over real edges; the others are dead.

        Args:
            live_outputs: Which outputs count, for a graph whose outputs feed another one. Default: all.
            real_index: The real edges, if known, to avoid choosing them again. Default: the current ones.
        """
        index = self.real_index if real_index is None else real_index
        live = torch.zeros(self.num_nodes, dtype=torch.bool, device=index.device)
        live[-self.num_outputs :] = True if live_outputs is None else live_outputs
        return reaching(self.candidates.pairs(index), live)

    def silent_nodes(self) -> Bool[Tensor, " nodes"]:
        """Return which nodes have no incoming real edge, but a state that their node function makes.

        The inputs are not among them where the dynamics sets their states: in static graphs, and with ``input_mode``
        ``"hold"`` or ``"sequence"``, unless they are outputs too.
        """
        silent = torch.ones(self.num_nodes, dtype=torch.bool, device=self.candidates.weight.device)
        silent[self.edge_index[1]] = False
        if self.dynamics.sets_inputs:
            silent[: min(self.num_inputs, self.nodes.outputs.start)] = False
        return silent

    @classmethod
    def from_data(
        cls, data: torch_geometric.data.Data | torch_geometric.data.HeteroData, **options: Any
    ) -> NeuralGraph:
        """Return a graph with the edges of a PyG graph: the inverse of :meth:`to_data` and :meth:`to_hetero_data`.

        Args:
            data: Has ``edge_index [2, k]`` and optionally ``edge_weight [k]``. For a static graph also the ``block`` of
                every node, ascending; for a dynamic one ``input_mask`` (the first nodes) and ``output_mask`` (the last
                ones). Options can replace these: ``blocks``, or ``num_inputs`` and ``num_outputs``. For a heterogeneous
                graph the node types, in order, are the blocks, and either all edge types have ``edge_weight`` or none.
            options: Arguments of the class. The default wiring is :class:`~dnw_graph.Fixed`: the edges stay. With
                another rule, training starts from them: all other candidates have weight 0.

        Raises:
            InputError: If an edge is not a candidate of the graph, edges are repeated, or the data does not define
                blocks or inputs and outputs.

        Examples:
            >>> from dnw_graph import NeuralGraph
            >>> graph = NeuralGraph(blocks=(4, 8, 4), num_edges=20)
            >>> again = NeuralGraph.from_data(graph.to_data())
            >>> bool((again.edge_index == graph.edge_index).all() and (again.edge_weight == graph.edge_weight).all())
            True
        """
        if isinstance(data, import_pyg().data.HeteroData):
            data = _of_one_type(data)
        if not isinstance(data, import_pyg().data.Data) or data.edge_index is None:
            raise wrong("from_data: data", "a torch_geometric.data.Data with edge_index", type(data).__name__)
        edges, weight = data.edge_index.cpu(), data.get("edge_weight")
        if weight is None and "wiring" in options and not isinstance(options["wiring"], Fixed):
            raise InputError("another rule starts from the weights of the edges: give edge_weight, or leave wiring out")
        graph = cls(**{**_nodes_of(data, options), "num_edges": edges.size(1), "wiring": Fixed(edges), **options})
        if weight is not None:
            flat = torch.zeros_like(graph.candidates.weight)
            flat[graph.candidates.flat_index(edges)] = weight.to(flat).flatten()
            graph.load_weights(flat)
            rule, index = graph.wiring, graph.candidates.flat_index(edges).sort().values
            if isinstance(rule, PruneAndGrow):  # An edge may have weight 0.
                rule.store(graph.view(), index)
            elif isinstance(rule, RandomGraph):
                rule.store(index)
            graph.forget()
        return graph

    def to_hetero_data(self) -> torch_geometric.data.HeteroData:
        """Return the wiring as a heterogeneous PyG graph: a node type per block, an edge type per pair of blocks.

        Node types are ``block0``, ``block1``, …, edge types ``("block0", "to", "block1")``; nodes are numbered within
        their block. Each has the attributes that :meth:`to_data` has for its nodes or edges.
        """
        whole, count = self.to_data(), len(self.blocks)
        source, target = whole.block[whole.edge_index]
        pairs, edge_type = (source * count + target).unique(return_inverse=True)
        nodes = {name: whole[name] for name in ("pos", "input_mask", "output_mask", "live_mask")}
        data = import_pyg().data.Data(edge_index=whole.edge_index, edge_weight=whole.edge_weight, **nodes)
        names = [f"block{number}" for number in range(count)]
        kinds = [(names[pair // count], "to", names[pair % count]) for pair in pairs.tolist()]
        return data.to_heterogeneous(whole.block, edge_type, names, kinds)

    def to_data(self) -> torch_geometric.data.Data:
        """Return the wiring as a PyG graph.

        The :class:`~torch_geometric.data.Data` holds ``edge_index [2, k]``, ``edge_weight [k]``, and for every node its
        ``block``, its position ``pos [nodes, 2]`` (x the block, y the index within it, both in 0 … 1), and whether it
        is an input (``input_mask``), an output (``output_mask``) and live (``live_mask``: a path of real edges leads to
        an output of this graph). For pictures it also holds the candidates (``candidate_blocks``: a list of one list
        with ``(first source, end of the sources, first target, end of the targets)`` per block), the ``name`` of the
        graph, its ``rule`` and its ``dynamics``. All tensors are on the CPU.
        """
        blocks, index = self.candidates.blocks, self.real_index
        return import_pyg().data.Data(
            edge_index=self.candidates.pairs(index).cpu(),
            edge_weight=self.wiring.values(self.view().weight)[index].detach().cpu(),
            num_nodes=self.num_nodes,
            **self.nodes.attributes(),
            live_mask=self.live_nodes(real_index=index).cpu(),
            # PyG would concatenate tensors, and divide a list of as many blocks as there are nodes or edges.
            candidate_blocks=[[(b.sources.start, b.sources.stop, b.targets.start, b.targets.stop) for b in blocks]],
            name=self.name,
            rule=wiring_name(type(self.wiring)),
            dynamics=type(self.dynamics).__name__,
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name={self.name!r}, blocks={self.blocks}, nodes={self.num_nodes:,}, "
            f"candidates={self.num_candidates:,}, k={self.num_edges:,}, wiring={self.wiring!r}, "
            f"dynamics={type(self.dynamics).__name__}({self.dynamics.extra_repr()}), propagation={self.propagation!r})"
        )


def _of_one_type(data: torch_geometric.data.HeteroData) -> torch_geometric.data.Data:
    """Return a heterogeneous PyG graph as one whose blocks are the node types."""
    weighted = ["edge_weight" in store for store in data.edge_stores]
    if any(weighted) and not all(weighted):
        lacking = data.edge_types[weighted.index(False)]
        raise InputError(f"edges of type {lacking} have no edge_weight, but others do: give it for all or for none")
    whole = data.to_homogeneous(add_edge_type=False)
    whole.block = whole.node_type
    return whole


def _nodes_of(data: torch_geometric.data.Data, options: dict[str, Any]) -> dict[str, Any]:
    """Return the roles of the nodes of a PyG graph, unless options give them."""
    if {"blocks", "num_inputs", "num_outputs"} & options.keys():
        return {} if "blocks" in options else {"num_nodes": data.num_nodes}
    dynamics = options.get("dynamics", "static")
    if dynamics == "static" or isinstance(dynamics, Static):
        if (block := data.get("block")) is None or (block.diff() < 0).any():
            raise InputError("the data has no ascending block for every node: give blocks=(inputs, …, outputs)")
        return {"blocks": tuple(block.bincount().tolist())}
    ends = [data.get(f"{name}_mask") for name in ("input", "output")]
    if any(mask is None for mask in ends) or (ends[0].int().diff() > 0).any() or (ends[1].int().diff() < 0).any():
        raise InputError(
            "the data does not mark the first nodes as inputs and the last as outputs: give num_inputs and num_outputs"
        )
    inputs, outputs = (int(mask.sum()) for mask in ends)
    return {"num_nodes": data.num_nodes, "num_inputs": inputs, "num_outputs": outputs}


def _make_nodes(
    dynamics: Dynamics,
    blocks: Sequence[int] | None,
    num_nodes: int | None,
    num_inputs: int | None,
    num_outputs: int | None,
) -> Nodes:
    counts = (num_nodes, num_inputs, num_outputs)
    if dynamics.in_blocks and (blocks is None or counts != (None, None, None)):
        raise InputError("a static graph takes blocks=(inputs, …, outputs) only, without num_nodes and the like")
    if dynamics.in_blocks and blocks is not None:
        return Nodes.in_blocks(blocks)
    if blocks is not None or num_nodes is None or num_inputs is None or num_outputs is None:
        raise InputError("a dynamic graph takes num_nodes, num_inputs and num_outputs, without blocks")
    return Nodes.flat(num_nodes, num_inputs, num_outputs)


def _check_ends(dynamics: Dynamics, stride: int, input_function: bool, output_function: bool) -> None:
    if not dynamics.in_blocks and (output_function or not input_function):
        raise InputError("input_function and output_function are for static graphs; here f_θ acts on every node")
    if stride != 1 and not input_function:
        raise InputError(f"stride {stride} is applied by the inputs' node function; set input_function=True")
