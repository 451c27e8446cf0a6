"""``compact``: a model as a plain inference module without dead nodes."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from dnw_graph._compat import remove_pruning, tree_leaves, unwrapped
from dnw_graph.analysis.chains import channel_wise
from dnw_graph.analysis.cost import cost_of, neural_graphs
from dnw_graph.arguments import checked, shown, wrong
from dnw_graph.compaction.convert import (
    GraphConverter,
    can_be_compacted,
    is_adaptive,
    needed_nodes,
    whole_functions,
    why_not,
)
from dnw_graph.compaction.functions import NORMS, linear_or_conv, steps
from dnw_graph.compaction.fusion import fold, fuse
from dnw_graph.compaction.network import Network, norms_behind, traced
from dnw_graph.compaction.plain_layers import Affine, Chain, Conv, Layer, Linear, Select
from dnw_graph.compaction.plans import apply
from dnw_graph.compaction.products import SparseProduct
from dnw_graph.compaction.report import Report, Size, relative_difference
from dnw_graph.compaction.rows import LAYERS, layer_rows
from dnw_graph.compaction.sequence import chain, silent_features
from dnw_graph.compaction.sparse_layers import SparseLayer, make_sparse, pays
from dnw_graph.compaction.static_graphs import STATE_DTYPES, FusedGraph, round_states
from dnw_graph.dynamics import Continuous
from dnw_graph.errors import InputError, unknown_name
from dnw_graph.model_card import card_of
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.sparse_layers import densify, weight_graphs
from dnw_graph.usual import as_its_class, copied, evaluating, histories

PRODUCTS = ("sparse", "dense")
SPARSE = (SparseProduct, SparseLayer, FusedGraph)
"""The layers of a compact model with sparse products."""


class CompactModel(Chain):
    """A model without dead nodes, as a chain of plain layers; made by :func:`compact` or ``load_compact``.

    Attributes:
        report: Sizes before and after; None if the model comes from a file.
    """

    report: Report | None = None

    def forward(self, z: Tensor, **options: Any) -> Tensor:
        """Apply the layers; options of a graph, such as ``times``, are refused, since inner states no longer exist."""
        if options:
            raise InputError(f"a compact model takes no options; got {', '.join(options)}: ask the original graph")
        if not isinstance(z, Tensor):
            raise wrong("the input of a compact model", "a tensor", z)
        return apply(self, list(self.layers), z)


@checked
def compact(
    model: nn.Module,
    *,
    products: str = "sparse",
    state_dtype: torch.dtype | None = None,
    example: Tensor | None = None,
) -> nn.Module:
    """Return a model as a plain inference module without dead nodes, with the same outputs.

    Nodes without a path of real edges to an output of the model are removed, in all graphs and in the convolution
    before the first one. Batch norms are folded into products and convolutions. A node without input edges is not
    silent: norm, ReLU and convolution map its zero input to a constant map. It stays, but an output without input edges
    becomes part of the bias of the linear layer that reads it.

    The result is a :class:`CompactModel` for the models of this package, a :class:`~dnw_graph.NeuralGraph`, an
    ``nn.Sequential`` of them and other layers, a module whose method ``modules_in_order`` returns the same, and
    networks with sparse layers, see below. Any other module is copied, and each graph in it is replaced by such a
    model.

    An adaptive solver takes other steps without the dead nodes, so outputs change within its tolerance; the report
    gives the difference.

    Linear layers and 2-dimensional convolutions with 4,096 weights or more, of which at most 30% are non-zero, become
    sparse layers, whether :func:`~dnw_graph.sparse_layers.sparsify` or another method made the zeros; other layers are
    faster dense. A module whose forward pass is a fixed network of layers, additions and pooling, such as torchvision's
    ResNets, becomes a :class:`CompactModel` if it has sparse layers; in any other module they replace the original
    layers.

    Args:
        model: The model, which stays unchanged. The real edges are those of evaluation.
        products: ``"sparse"``: products over edges are sparse; static graphs of norm → ReLU → 3×3 convolution, and
            sparse layers, are single operators, whose kernels are for CPUs. ``"dense"``: matrices with zeros, in
            plain PyTorch operators: for ONNX, and faster on a GPU.
        state_dtype: Rounds the states that nodes send, in static graphs that are single operators. ``torch.bfloat16``
            halves the memory to read; sums and convolutions use float32. ``torch.int8``, with a scale for each node,
            quarters it; sums use 16-bit integers, convolutions float32. Default: the dtype of the model.
        example: A batch of inputs, for a model with a single argument. With it, the report includes multiply-adds and
            the difference of the outputs. The scales for ``torch.int8`` come from the states it leads to: give about
            100 inputs like those that the model will see.

    Returns:
        The compact model, in evaluation mode, with the :class:`~dnw_graph.compaction.Report` as its ``report``.

    Raises:
        InputError: If ``products`` or ``state_dtype`` is unknown, they do not fit together, the model has no graph
            whose states can be rounded, dense products are asked of a compact model with sparse ones, an example is
            needed, or the model cannot take it.

    Examples:
        >>> import torch
        >>> from dnw_graph.compaction import compact
        >>> from dnw_graph.models import MobileNetV1DNW
        >>> small = compact(MobileNetV1DNW(wiring="random_graph", num_classes=10))
        >>> small(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """
    if products not in PRODUCTS:
        raise unknown_name("kind of products", products, PRODUCTS)
    if state_dtype not in STATE_DTYPES.values():
        raise wrong("state_dtype", "torch.bfloat16, torch.int8 or None", state_dtype)
    if state_dtype is not None and products != "sparse":
        raise InputError('state_dtype is for products="sparse"')
    if state_dtype is torch.int8 and example is None:
        raise InputError("state_dtype=torch.int8 needs an example: the images that the scales of states come from")
    original = model = unwrapped(model)
    if products == "dense" and any(isinstance(module, SPARSE) for module in model.modules()):
        raise InputError(
            'products="dense", which ONNX needs, is for original models: this one is compact already, with sparse '
            "products; give the original, such as a checkpoint"
        )
    if example is not None:
        check_example(model, example)
    if weight_graphs(model) or prune.is_pruned(model) or histories(model):
        model = copied(model)
        remove_pruning(model)
        if weight_graphs(model):
            densify(model)
    report = Report()
    with torch.no_grad(), evaluating(original, model):
        compacted = _Compactor(products == "sparse", report).compact(model)
        if products == "sparse":
            make_sparse(compacted)
        for module in list(compacted.modules()):
            if isinstance(module, Network):
                module.join()
            if isinstance(module, CompactModel):
                module.layers = nn.ModuleList(fuse(list(module.layers)))
        compacted.eval()
        if state_dtype is not None:
            round_states(compacted, state_dtype, example)
        report.layers = layer_rows(model, compacted, example)
        for size, counted in ((report.before, original), (report.after, compacted)):
            _count(size, counted, example)
        if example is not None:
            _compare(model, compacted, example, report)
    compacted.report = report  # type: ignore[assignment]
    if card := card_of(model):
        card.describe(compacted)
    return compacted


class _Compactor:
    """One pass over a model, from its end to its beginning, which propagates the wanted channels.

    Args:
        sparse: Whether products are sparse.
        report: Gets sizes and notes.
    """

    def __init__(self, sparse: bool, report: Report) -> None:
        self.sparse = sparse
        self.report = report
        self.sizes: dict[NeuralGraph, tuple[Size, Size]] = {}

    def compact(self, model: nn.Module) -> nn.Module:
        """Return the model as a chain of plain layers, or a copy of it with its graphs as such chains."""
        self.names = {module: name for name, module in model.named_modules()}
        modules = chain(model)
        compacted: nn.Module
        if modules != [model] or can_be_compacted(model):
            compacted = CompactModel(self._layers(modules))
        elif (network := self._network(model)) is not None:
            compacted = CompactModel([network])
        else:
            compacted = self._copy(model)
        for name, graph in neural_graphs(model).items():
            if graph in self.sizes:
                self.report.add(name, *self.sizes[graph])
        return compacted

    def _network(self, model: nn.Module) -> Network | None:
        """Return a module with sparse layers as a network of plain layers, or None if it is not known to be one."""
        if not self.sparse or not any(_is_sparse(module) for module in model.modules()):
            return None

        def converted(module: nn.Module) -> list[nn.Module] | None:
            known = steps(module)
            if known is not None:
                return list(known) or [Chain([])]
            layer = self._plain(module)
            return [layer] if isinstance(layer, Layer) else None

        return traced(model, converted)

    def _layers(self, modules: list[nn.Module]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        wanted: Tensor | None = None
        for place in reversed(range(len(modules))):
            new, wanted = self._convert(modules[: place + 1], wanted)
            layers = new + layers
        if wanted is not None:
            layers.insert(0, Select(wanted))
        return fold(layers)

    def _convert(self, modules: list[nn.Module], wanted: Tensor | None) -> tuple[list[nn.Module], Tensor | None]:
        """Return the layers of the last module for the wanted channels, and the input channels that they need."""
        module = modules[-1]
        if isinstance(module, NeuralGraph) and can_be_compacted(module):
            return self._graph(module, wanted)
        known = steps(module)
        if known is not None:
            return [layer if wanted is None else layer.cut(wanted) for layer in known], wanted
        new = self._plain(module)
        if channel_wise(module) and as_its_class(module) and not module.state_dict():  # Pooling, for one.
            return [new], wanted
        if isinstance(new, Conv) and new.groups == 1:
            cut = new if wanted is None else new.cut(wanted)
            cut.label = new.label
            return [cut], None
        layers = [new] if wanted is None else [new, Select(wanted)]
        if isinstance(new, Linear) and (silent := silent_features(modules[:-1])) is not None:
            used = silent.isnan().nonzero().flatten()
            constant = new.weight @ silent.nan_to_num()
            shorter = Linear(new.weight[:, used], constant if new.bias is None else new.bias + constant)
            shorter.label = new.label
            return [shorter, *layers[1:]], used
        return layers, None

    def _graph(self, graph: NeuralGraph, wanted: Tensor | None) -> tuple[list[nn.Module], Tensor | None]:
        live = needed_nodes(graph, wanted)
        source, target = graph.edge_index
        before = Size(graph.num_nodes, len(source))
        after = Size(int(live.sum()), int((live[source] & live[target]).sum()))
        self.sizes[graph] = (before, after)
        self.report.kept += whole_functions(graph)
        if is_adaptive(graph.dynamics):
            self.report.adaptive.append(graph.name)
        inputs = live[: graph.num_inputs]
        # In a sequence the nodes are another dimension, so the graph itself selects the inputs.
        every = bool(inputs.all()) or graph.dynamics.node_dim != 1
        layers = GraphConverter(graph, live, wanted, self.sparse).layers()
        return layers, None if every else inputs.nonzero().flatten()

    def _plain(self, module: nn.Module) -> nn.Module:
        """Return a module that may mix channels as a layer, or a copy of it with its graphs compacted."""
        layer = linear_or_conv(module)
        if layer is None:
            copied = self._copy(module)
            if isinstance(module, LAYERS):
                copied.label = self.names.get(module, "")
            return copied
        layer.label = self.names.get(module, "")
        return layer

    def _copy(self, module: nn.Module) -> nn.Module:
        """Return a copy with a compact model in place of every model that can be one."""
        memo: dict[int, Any] = {}
        inside: set[nn.Module] = set()
        norms: dict[nn.Module, nn.Module] | None = None
        for child in module.modules():
            if child in inside:
                continue
            modules: list[nn.Module] = [child] if isinstance(child, nn.Sequential) else chain(child)
            if can_be_compacted(child) or modules != [child]:
                memo[id(child)] = CompactModel(self._layers(modules))
                inside |= set(child.modules())
            elif self.sparse and _is_sparse(child) and isinstance(layer := self._plain(child), Conv | Linear):
                norms = norms_behind(module) if norms is None else norms
                norm = norms.get(child)
                # Of other inputs than vectors a norm behind a linear layer normalises another dimension.
                affine = steps(norm) if isinstance(norm, NORMS) and isinstance(layer, Conv) else None
                if affine and isinstance(affine[0], Affine) and layer.absorb(affine[0].scale, affine[0].shift):
                    memo[id(norm)] = nn.Identity()
                memo[id(child)] = layer
            elif isinstance(child, NeuralGraph):
                self.report.kept.append(f"{child.name}: {why_not(child)}")
        return copy.deepcopy(module, memo)


def _is_sparse(module: nn.Module) -> bool:
    known = type(module) in (nn.Linear, nn.Conv2d) and as_its_class(module)
    return known and isinstance(module.weight, Tensor) and pays(module.weight)


def check_example(model: nn.Module, example: Tensor) -> None:
    """Refuse an example that the model cannot take, before any work is done."""
    try:
        with torch.no_grad(), evaluating(model):
            out = model(example)
        if not _tensors(out):
            raise InputError(
                f"{type(model).__name__} returns {shown(out)}: an example is for models that return tensors, or a "
                "tuple, list or dict of them"
            )
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{type(model).__name__} cannot take the example, {shown(example)}: {reason}") from error


def _count(size: Size, model: nn.Module, example: Tensor | None) -> None:
    """Note the cost of a model with all its nodes."""
    size.parameters = cost_of(model, None, dead_nodes=True).parameters
    if example is not None:
        with suppress(InputError):  # The multiply-adds of an operator are unknown.
            size.multiply_adds = cost_of(model, example[:1], dead_nodes=True).multiply_adds


def _compare(model: nn.Module, compacted: nn.Module, example: Tensor, report: Report) -> None:
    """Report the difference of the outputs for an example."""
    expected = _tensors(model(example))
    report.difference = relative_difference(_tensors(compacted(example)), expected)
    if report.adaptive:
        closer = copy.deepcopy(model)
        for module in closer.modules():
            if isinstance(module, Continuous):
                module.rtol, module.atol = module.rtol / 10, module.atol / 10
        report.tolerance_difference = relative_difference(_tensors(closer(example)), expected)


def _tensors(outputs: object) -> list[Tensor]:
    return [each for each in tree_leaves(outputs) if isinstance(each, Tensor)]
