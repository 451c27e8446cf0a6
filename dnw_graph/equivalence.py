"""Networks rewritten as discrete-time neural graphs: perceptrons, static graphs and LSTMs (Section 2.3 of the paper).

Every weight of the network becomes the weight of one edge; biases, activations, gates and norms become the node
function.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dnw_graph.arguments import checked
from dnw_graph.candidates import CandidateEdges
from dnw_graph.dynamics import Discrete, Static
from dnw_graph.errors import InputError
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.node_functions import Biased, Blockwise
from dnw_graph.wirings import Fixed

M = TypeVar("M", bound=nn.Module)


@checked
def mlp_to_discrete(mlp: nn.Sequential) -> NeuralGraph:
    """Return the discrete graph that equals a multi-layer perceptron (Figure 1 of the paper).

    The units of all layers are nodes, a perceptron of L linear layers takes L steps, and the weights of layer ℓ are the
    edges from the units of layer ℓ to those of layer ℓ + 1.

    Args:
        mlp: ``nn.Linear`` layers, each followed by any element-wise modules.

    Raises:
        InputError: If the module does not begin with a linear layer or the sizes of two layers do not fit.
    """
    layers: list[nn.Linear] = []
    activations: list[list[nn.Module]] = []
    for module in mlp:
        if isinstance(module, nn.Linear):
            layers.append(module)
            activations.append([])
        elif not layers:
            raise InputError(f"a perceptron begins with nn.Linear; this one begins with {module}")
        else:
            activations[-1].append(_out_of_place(copy.deepcopy(module)))
    if not layers:
        raise InputError("the perceptron has no nn.Linear layer")
    for first, second in pairwise(layers):
        if first.out_features != second.in_features:
            raise InputError(f"{second} cannot follow {first}")
    sizes = [layers[0].in_features, *(layer.out_features for layer in layers)]
    functions: list[nn.Module] = [nn.Identity()]
    functions += [Biased(m.bias, nn.Sequential(*after)) for m, after in zip(layers, activations, strict=True)]
    graph = NeuralGraph(
        num_nodes=sum(sizes),
        num_inputs=sizes[0],
        num_outputs=sizes[-1],
        dynamics=Discrete(steps=len(layers)),
        candidates=CandidateEdges.adjacent(sizes),
        node_function=Blockwise(functions, sizes),
        name="perceptron",
    )
    return _with_weights(graph, [layer.weight for layer in layers], like=layers[0].weight)


def _out_of_place(module: M) -> M:
    """Turn off writes in place: a block's part of the states is a view of all of them."""
    for each in module.modules():
        if getattr(each, "inplace", False):
            each.inplace = False  # type: ignore[assignment]
    return module


@checked
def static_to_discrete(graph: NeuralGraph) -> nn.Sequential:
    """Return the discrete graph that equals a static one: its inputs held, one step per block after the first.

    Outputs and gradients are equal in evaluation, and in training if the norms keep no running statistics: those of a
    batch norm would include states from before a block's inputs have arrived. Candidates, edges, wiring and node
    functions are copies of the static graph's.

    Args:
        graph: A static graph whose functions keep the resolution, except at the inputs. The function of its inputs is
            applied before the recurrence.

    Raises:
        InputError: If the graph is not static.
    """
    static = graph.dynamics
    if not isinstance(static, Static):
        raise InputError(f"{graph.name}: only a static graph can be rewritten; this one is {type(static).__name__}")
    static = _out_of_place(copy.deepcopy(static))
    blocks = list(graph.blocks)
    functions = [nn.Identity(), *static.node_functions[1:]]
    discrete = NeuralGraph(
        num_nodes=graph.num_nodes,
        num_inputs=graph.num_inputs,
        num_outputs=graph.num_outputs,
        num_edges=graph.num_edges,
        wiring=graph.wiring,
        dynamics=Discrete(steps=len(blocks) - 1, input_mode="hold"),
        candidates=graph.candidates,
        node_function=Blockwise(functions, blocks),
        propagation=graph.propagation,
        name=graph.name,
    )
    # Edges that are not a function of the weights were redrawn above.
    discrete.wiring.load_state_dict(graph.wiring.state_dict())
    with torch.no_grad():
        discrete.candidates.weight.copy_(graph.candidates.weight)
    discrete.forget()
    model = nn.Sequential(static.node_functions[0], discrete)
    model.train(graph.training)
    return model


class LSTMGraph(nn.Module):
    """An LSTM as a discrete graph with input at every step; made by :func:`lstm_to_discrete`.

    Nodes are the inputs and, per layer, 4H gates, H cells c and H hidden units h. The edges x → gates are W_ih, h →
    gates are W_hh, and every cell has an edge of weight 1 to itself: the node function computes, from the inputs
    of gates and cells, c ← σ(f) c + σ(i) tanh(g) and h ← σ(o) tanh(c). Layer l works one step behind layer l - 1, so
    that a sequence of T elements takes T + layers - 1 steps.

    Args:
        graph: The discrete graph.
        layers: Number of layers.
        hidden: Number of hidden units H.
        batch_first: Whether sequences are ``[batch, time, inputs]`` or ``[time, batch, inputs]``.

    Shapes:
        - input: as in ``torch.nn.LSTM``: a batched, unbatched or packed sequence; optionally the initial states (h, c),
          each ``[layers, batch, H]``; default zero
        - output: as in ``torch.nn.LSTM``: the sequence of the last layer's h, and (h, c) after the last element, each
          ``[layers, batch, H]``
    """

    @checked
    def __init__(self, graph: NeuralGraph, layers: int, hidden: int, batch_first: bool) -> None:
        super().__init__()
        self.graph = graph
        self.layers = layers
        self.hidden = hidden
        self.batch_first = batch_first

    def forward(
        self, x: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the sequence."""
        if isinstance(x, PackedSequence):
            return self._run_packed(x, hx)
        if x.dim() == 2:
            start = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            output, (h, c) = self._run(x.unsqueeze(0), start)
            return output.squeeze(0), (h.squeeze(1), c.squeeze(1))
        output, last = self._run(x if self.batch_first else x.transpose(0, 1), hx)
        return (output if self.batch_first else output.transpose(0, 1)), last

    def _run_packed(
        self, x: PackedSequence, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        """Run sequences padded to the longest: padding does not change the results before it."""
        given, found = x.sorted_indices, x.unsorted_indices
        padded, lengths = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes), batch_first=True)
        if hx is not None and given is not None:
            hx = hx[0][:, given], hx[1][:, given]
        output, last = self._run(padded, hx, lengths.to(padded.device))
        packed = pack_padded_sequence(output, lengths, batch_first=True)
        if found is not None:
            last = last[0][:, found], last[1][:, found]
        return PackedSequence(packed.data, packed.batch_sizes, given, found), last

    def _run(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run sequences ``[batch, time, inputs]``, and return h and c of each after its last element."""
        batch, lag = x.size(0), self.layers - 1
        elements = nn.functional.pad(x, (0, 0, 0, lag))
        states = self.graph(elements, return_states=True) if hx is None else self._started(elements, hx)
        cells, hiddens = zip(
            *((states[:, :, c.start : c.stop], states[:, :, h.start : h.stop]) for _, c, h in self._layer_nodes()),
            strict=True,
        )
        rows = torch.arange(batch, device=x.device)
        ends = x.size(1) if lengths is None else lengths
        h, c = (torch.stack([s[rows, ends + n] for n, s in enumerate(part)]) for part in (hiddens, cells))
        return hiddens[-1][:, lag + 1 :], (h, c)

    def _started(self, elements: Tensor, hx: tuple[Tensor, Tensor]) -> Tensor:
        """Return the states at all steps; the initial state of a layer is set when the layer starts."""
        h0, c0 = hx
        shape = (self.layers, elements.size(0), self.hidden)
        if h0.shape != shape or c0.shape != shape:
            given = f"{list(h0.shape)} and {list(c0.shape)}"
            raise InputError(f"{self.graph.name}: h and c at the start must be {list(shape)} each; got {given}")
        z = elements.new_zeros(elements.size(0), self.graph.num_nodes)
        parts = []
        for layer, (_, cells, hiddens) in enumerate(self._layer_nodes()):
            z = torch.cat([z[:, : cells.start], c0[layer], h0[layer], z[:, hiddens.stop :]], dim=1)
            now = elements[:, layer:] if layer == self.layers - 1 else elements[:, layer : layer + 1]
            states = self.graph(now, return_states=True, initial_states=z, first_step=layer)
            z = states[:, -1]
            parts.append(states[:, :-1])
        return torch.cat([*parts, z.unsqueeze(1)], dim=1)

    def _layer_nodes(self) -> list[tuple[range, range, range]]:
        return lstm_nodes(self.graph.num_inputs, self.layers, self.hidden)


class Gates(nn.Module):
    """The node function of an LSTM's graph: biases and gates.

    Args:
        biases: ``[4H]`` per layer: input, forget, cell and output gates.
        num_inputs: Number of input nodes.

    Shapes:
        - input and output: ``[batch, nodes]``
    """

    @checked
    def __init__(self, biases: list[Tensor], num_inputs: int) -> None:
        super().__init__()
        self.biases = nn.ParameterList(nn.Parameter(bias) for bias in biases)
        self.num_inputs = num_inputs

    def forward(self, z: Float[Tensor, "batch nodes"], step: int) -> Float[Tensor, "batch nodes"]:
        """Return the states after a step."""
        hidden = self.biases[0].numel() // 4
        states = [torch.zeros_like(z[:, : self.num_inputs])]
        nodes = lstm_nodes(self.num_inputs, len(self.biases), hidden)
        for layer, ((gates, cells, _), bias) in enumerate(zip(nodes, self.biases, strict=True)):
            received = z[:, gates.start : gates.stop] + bias
            i, f, g, o = received.chunk(4, dim=1)
            c = f.sigmoid() * z[:, cells.start : cells.stop] + i.sigmoid() * g.tanh()
            # A layer stays at zero until the first element has reached it.
            started = float(step >= layer)
            states += [torch.zeros_like(received), c * started, o.sigmoid() * c.tanh() * started]
        return torch.cat(states, dim=1)


def lstm_nodes(num_inputs: int, layers: int, hidden: int) -> list[tuple[range, range, range]]:
    """Return gates, cells and hidden units of every layer in the node order of an LSTM's graph."""
    starts = [num_inputs + layer * 6 * hidden for layer in range(layers)]
    return [
        (range(s, s + 4 * hidden), range(s + 4 * hidden, s + 5 * hidden), range(s + 5 * hidden, s + 6 * hidden))
        for s in starts
    ]


@checked
def lstm_to_discrete(lstm: nn.LSTM) -> LSTMGraph:
    """Return the discrete graph with input at every step that equals an LSTM.

    W_ih and W_hh are edge weights, one edge each; the node function holds the biases (b_ih + b_hh) and the gates.

    Args:
        lstm: A unidirectional LSTM of one or several layers, with or without biases.

    Raises:
        InputError: If the LSTM is bidirectional, or has projections or dropout between layers.
    """
    if lstm.bidirectional:
        raise InputError("a bidirectional LSTM is two graphs, one per direction: rewrite each direction separately")
    if lstm.proj_size:
        raise InputError(f"an LSTM with projections (proj_size = {lstm.proj_size}) is not supported; use proj_size=0")
    if lstm.dropout and lstm.num_layers > 1:
        raise InputError(f"dropout between layers ({lstm.dropout}) is not supported; use dropout=0")
    parameters = dict(lstm.named_parameters())
    hidden, num_inputs, layers = lstm.hidden_size, lstm.input_size, lstm.num_layers
    nodes = lstm_nodes(num_inputs, layers, hidden)
    blocks: list[tuple[range, range]] = []
    weights: list[Tensor] = []
    below = range(num_inputs)
    for layer, (gates, cells, hiddens) in enumerate(nodes):
        w_ih, w_hh = parameters[f"weight_ih_l{layer}"], parameters[f"weight_hh_l{layer}"]
        blocks += [(below, gates), (hiddens, gates), (cells, cells)]
        weights += [w_ih, w_hh, torch.eye(hidden, dtype=w_hh.dtype, device=w_hh.device)]
        below = hiddens
    candidates = CandidateEdges(blocks)
    # Among pairs of cells only self-loops are edges.
    real = [
        torch.eye(hidden) if block.sources == block.targets else torch.ones(block.shape) for block in candidates.blocks
    ]
    index = torch.cat([part.flatten() for part in real]).nonzero().flatten()
    weight = parameters["weight_ih_l0"]
    zero = torch.zeros(4 * hidden, dtype=weight.dtype, device=weight.device)
    biases = [
        (parameters[f"bias_ih_l{n}"] + parameters[f"bias_hh_l{n}"]).detach() if lstm.bias else zero.clone()
        for n in range(layers)
    ]
    graph = NeuralGraph(
        num_nodes=candidates.num_nodes,
        num_inputs=num_inputs,
        num_outputs=hidden,
        num_edges=index.numel(),
        wiring=Fixed(candidates.pairs(index)),
        dynamics=Discrete(input_mode="sequence"),
        candidates=candidates,
        node_function=Gates(biases, num_inputs),
        name="lstm",
    )
    return LSTMGraph(_with_weights(graph, weights, like=weight), layers, hidden, lstm.batch_first)


def _with_weights(graph: NeuralGraph, weights: list[Tensor], like: Tensor) -> NeuralGraph:
    """Set the candidate weights block by block, on the device and in the precision of ``like``."""
    graph.to(like.device, like.dtype)
    with torch.no_grad():
        graph.candidates.weight.copy_(torch.cat([weight.flatten() for weight in weights]))
    return graph
