"""Counts the parameters and multiply-adds of a model's real edges and live nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dnw_graph.analysis.chains import reading_graphs
from dnw_graph.analysis.live_channels import classifier_columns, live_channels
from dnw_graph.analysis.multiply_adds import MultiplyAdds
from dnw_graph.arguments import checked, require
from dnw_graph.candidates import CandidateEdges
from dnw_graph.columns import in_columns
from dnw_graph.errors import InputError
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.sparse_layers.access import sparse_parameters

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
"""Modules whose weights and biases are parameters of norms."""


@dataclass(frozen=True)
class CostRow:
    """Cost of one part of a model.

    Attributes:
        name: A neural graph's name, or the name of the submodule; costs outside of submodules have the name of the
            model's class.
        parameters: Number of parameters, see :class:`Cost`.
        multiply_adds: Multiply-adds for one image, see :class:`Cost`.
    """

    name: str
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Cost:
    """Cost of a model; ``print`` shows it as a table.

    Attributes:
        rows: The stages or other parts of the model with a cost, in order.
    """

    rows: tuple[CostRow, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters: those of live real edges, live nodes and all other layers, including norms."""
        return sum(row.parameters for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of products, convolutions and edges for one image; the paper calls them FLOPs."""
        return sum(row.multiply_adds for row in self.rows)

    def __str__(self) -> str:
        total = CostRow("total", self.parameters, self.multiply_adds)
        cells = [("part", "parameters", "multiply-adds")]
        cells += [(row.name, f"{row.parameters:,}", f"{row.multiply_adds:,}") for row in (*self.rows, total)]
        return in_columns(cells, left=(0,))


@checked
def neural_graphs(model: nn.Module) -> dict[str, NeuralGraph]:
    """Return the neural graphs of a model by name, in the order of the model.

    Graphs with the same name are listed by their module paths, and so is a graph whose name is the path of another.
    """
    graphs = {path: graph for path, graph in model.named_modules() if isinstance(graph, NeuralGraph)}
    names = [graph.name for graph in graphs.values()]

    def own(path: str, name: str) -> bool:
        return names.count(name) == 1 and (name == path or name not in graphs)

    return {graph.name if own(path, graph.name) else path: graph for path, graph in graphs.items()}


@checked
def live_nodes(
    model: nn.Module, real_index: Mapping[str, Int[Tensor, " edges"]] | None = None
) -> dict[str, Bool[Tensor, " nodes"]]:
    """Return, by graph name, which nodes reach an output of the model over real edges; the others are dead.

    In an ``nn.Sequential``, nested ones too, and in the models of this package, an output of a graph counts only if it
    is a live input of the next graph, provided that all modules between them treat every channel separately: batch
    norms, activations, pooling, dropout, depthwise convolutions. Any other module in which graphs feed one another
    defines a method ``live_nodes_by_graph()``, which returns such masks by graph. Otherwise all outputs of a graph
    count.

    Args:
        model: The model.
        real_index: Known real edges by graph name, to avoid choosing them again. Default: the current ones.
    """
    graphs = neural_graphs(model)
    known = {graphs[name]: index for name, index in (real_index or {}).items() if name in graphs}
    masks: dict[NeuralGraph, Tensor] = {}
    for module in model.modules():
        by_graph = getattr(module, "live_nodes_by_graph", None)
        if by_graph is not None:
            masks |= by_graph()
    read_by = reading_graphs(model)

    def live(graph: NeuralGraph) -> Tensor:
        if graph not in masks:
            reader = read_by.get(graph)
            wanted = None if reader is None else live(reader)[: reader.num_inputs]
            masks[graph] = graph.live_nodes(wanted, known.get(graph))
        return masks[graph]

    return {name: live(graph) for name, graph in graphs.items()}


@checked
def cost(model: nn.Module, input_size: Sequence[int], *, paper: bool = False, dead_nodes: bool = False) -> Cost:
    """Count the parameters and multiply-adds of a model, part by part, without its dead nodes.

    One image of zeros is sent through the model in evaluation mode. The count includes live real edges, at every
    product, step of a discrete graph and evaluation of a continuous one; node functions at live nodes; the channels for
    live inputs of a convolution or linear layer that feeds only a graph, in an ``nn.Sequential`` or a model of this
    package; and everything else as in PyTorch's ``FlopCounterMode``, with two FLOPs per multiply-add. It excludes
    activations, norms and pooling. Modes, hooks, wiring and random state of the model stay unchanged.

    With ``paper=True`` the count is that of Table 3 of the paper, without the parameters of norms. Each graph is
    considered alone: an input or inner node is dead if no real edge leaves it, whether or not its targets reach an
    output; all real edges count; and a linear ``classifier`` that reads the outputs of the last graph has no column for
    outputs at which no real edge arrives.

    Args:
        model: Any module, with or without neural graphs, such as those of torchvision and timm.
        input_size: Size of one image without the batch, such as ``(3, 224, 224)``.
        paper: Count as in the paper.
        dead_nodes: Count dead nodes, and the edges into them, like the others.

    Raises:
        InputError: If the model cannot take an image of that size, has lazy or scripted modules, or computes with an
            operator whose multiply-adds are unknown.

    Examples:
        >>> from torch import nn
        >>> from dnw_graph.analysis.cost import cost
        >>> print(cost(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 10)), (3, 4, 4)))
        part   parameters  multiply-adds
        0             224          3,456
        2           1,290          1,280
        total       1,514          4,736
    """
    expected = "the size of one image without the batch, such as (3, 224, 224)"
    require(len(input_size) > 0 and min(input_size) > 0, "input_size", expected, input_size)
    tensors = [*model.parameters(), *model.buffers()]
    if any(map(is_lazy, tensors)):
        raise InputError(f"{type(model).__name__} has lazy modules without a shape: send one batch through it first")
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    image = torch.zeros(1, *input_size, dtype=like.dtype, device=like.device)
    return cost_of(model, image, paper, dead_nodes)


def cost_of(model: nn.Module, image: Tensor | None, paper: bool = False, dead_nodes: bool = False) -> Cost:
    """Count as :func:`cost` does, with a batch of one image, or the parameters alone without one."""
    with _left_as_it_was(model), torch.no_grad():
        graphs = neural_graphs(model)
        if dead_nodes:
            live = {graph: torch.ones_like(graph.live_nodes()) for graph in graphs.values()}
        elif paper:
            live = _with_output_edge(graphs)
        else:
            live = {graphs[name]: mask for name, mask in live_nodes(model).items()}
        counted_targets = {graph: torch.ones_like(mask) if paper else mask for graph, mask in live.items()}
        channels = live_channels(model, live)
        columns = classifier_columns(model) if paper and not dead_nodes else {}
        rows = _rows(model)
        parameters = _count_parameters(rows, channels, columns, NORMS if paper else ())
        for graph, counted in counted_targets.items():
            parameters[rows[graph]] += int(counted[graph.edge_index[1]].sum())
        counter = MultiplyAdds(rows, channels | {layer: [mask] for layer, mask in columns.items()}, counted_targets)
        if image is not None:
            _send_image(model, image, counter)
    found = (CostRow(name, parameters[name], int(counter.counts[name])) for name in dict.fromkeys(rows.values()))
    return Cost(tuple(row for row in found if row.parameters or row.multiply_adds))


def _send_image(model: nn.Module, image: Tensor, counter: MultiplyAdds) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise InputError(f"{type(model).__name__} has scripted modules, whose cost is unknown: count it unscripted")
    try:
        with counter.listening():
            model.eval()(image)
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{type(model).__name__} cannot take one image of size {tuple(image.shape[1:])} ({type(error).__name__}: "
            f"{reason}); give the size of one image without the batch, such as (3, 224, 224)"
        ) from error


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore modes, chosen edges, other state that a forward pass sets on modules, and the random state."""
    attributes = {module: dict(vars(module)) for module in model.modules()}
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for module, before in attributes.items():
                vars(module).clear()
                vars(module).update(before)


def _with_output_edge(graphs: dict[str, NeuralGraph]) -> dict[NeuralGraph, Tensor]:
    """Return which nodes of each graph are outputs or have a real edge to any node."""
    live = {}
    for graph in graphs.values():
        source = graph.edge_index[0]
        live[graph] = torch.zeros(graph.num_nodes, dtype=torch.bool, device=source.device)
        live[graph][-graph.num_outputs :] = True
        live[graph][source] = True
    return live


def _rows(model: nn.Module) -> dict[nn.Module, str]:
    """Return the name under which every module is counted: that of a child of the model, or of an entry of a list."""
    graph_names: dict[nn.Module, str] = {graph: name for name, graph in neural_graphs(model).items()}
    if model in graph_names:
        return dict.fromkeys(model.modules(), graph_names[model])
    own = type(model).__name__
    rows = {model: own}

    def name_children(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            if type(child) in (nn.ModuleList, nn.ModuleDict):
                rows.setdefault(child, own)
                name_children(child, f"{prefix}{name}.")
            else:
                for module in child.modules():
                    rows.setdefault(module, graph_names.get(child, prefix + name))

    name_children(model, "")
    return rows


def _count_parameters(
    rows: dict[nn.Module, str],
    channels: dict[nn.Module, list[Tensor]],
    columns: dict[nn.Module, Tensor],
    left_out: tuple[type[nn.Module], ...],
) -> Counter[str]:
    """Count all parameters except those of edges and of some module types; shared ones once."""
    counts: Counter[str] = Counter()
    counted: set[nn.Parameter] = set()
    model = next(iter(rows))
    real = {
        parts.parts[0][0].parameter: int(parts.masks()[0].count_nonzero())
        for _, _, _, parts in sparse_parameters(model)
    }
    for module, row in rows.items():
        if isinstance(module, (CandidateEdges, *left_out)):
            continue
        if (own := getattr(module, "own_parameters", None)) is not None:  # a layer of a compact model
            counts[row] += own()
        for parameter in set(module.parameters(recurse=False)) - counted:
            counted.add(parameter)
            number = real.get(parameter, parameter.numel())
            masks = channels.get(module, [])
            if masks and parameter.dim() and all(len(mask) == parameter.size(0) for mask in masks):
                number = number // parameter.size(0) * int(torch.stack(masks).any(0).sum())
            if module in columns and parameter.dim() == 2:
                number = number // parameter.size(1) * int(columns[module].sum())
            counts[row] += number
    return counts
