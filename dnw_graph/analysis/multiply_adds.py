"""Counts multiply-adds of operators, layers and edges, by module in a forward pass, and of a training step."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dnw_graph.ops.flops  # noqa: F401
from dnw_graph._compat import OPERATORS_WITHOUT_FORMULA, TorchDispatchMode, tree_leaves
from dnw_graph.errors import InputError
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.propagation import Propagate, Propagation, RealEdges
from dnw_graph.propagation.propagate import States
from dnw_graph.sparse_layers.forward_pass import RealWeights
from dnw_graph.sparse_layers.layers import LayerWeight
from dnw_graph.sparse_layers.weight_graph import WeightGraph

aten = torch.ops.aten


def layer_multiply_adds(weight: Tensor, written: int) -> int:
    """Return the multiply-adds of a convolution or linear layer that writes ``written`` values."""
    return written * weight[0].numel()


def edges_between(source: Tensor, target: Tensor, sources: range, targets: range) -> int:
    """Return how many edges lead from some nodes to others."""
    used = (source >= sources.start) & (source < sources.stop)
    return int((used & (target >= targets.start) & (target < targets.stop)).sum())


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any, **_: Any) -> int:
    return 2 * sum(args[-1][:2]) * layer_multiply_adds(weight, grad.numel())


# PyTorch's counter omits products with a vector, and counts the weight gradient of a grouped convolution as that of a
# full one.
_FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mv: lambda matrix, *_, **__: 2 * matrix.numel(),
    aten.addmv: lambda _, matrix, *__, **___: 2 * matrix.numel(),
    aten.dot: lambda vector, *_, **__: 2 * vector.numel(),
    aten.convolution_backward: _convolution_backward,
}


def operations(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the operations of a call of an operator, two per multiply-add; 0 if unknown."""
    formula = (flop_registry | _FORMULAS).get(operator.overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


def performed(call: Callable[[], object]) -> int:
    """Return the multiply-adds that operators perform in a call, those of dense products with zeros included."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


class MultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of a model's forward pass.

    PyTorch's formulas count the operators. Each count is attributed to the running module, multiplied by the share of
    live channels and, in a sparse layer, by the share of real weights. The product over a graph's edges counts one
    multiply-add per counted real edge and pixel, however many zeros an implementation multiplies.

    Args:
        rows: The row name of each module.
        live: Modules with possibly dead channels, with the masks of their live channels: one for each place where the
            module is used.
        counted_targets: For every graph, the nodes whose incoming real edges are counted.

    Attributes:
        counts: Multiply-adds by name.

    Raises:
        InputError: In the forward pass, if the multiply-adds of an operator are unknown.
    """

    def __init__(
        self,
        rows: Mapping[nn.Module, str],
        live: Mapping[nn.Module, Sequence[Tensor]],
        counted_targets: Mapping[NeuralGraph, Tensor],
    ) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._rows = rows
        self._live = live
        self._counted_targets = counted_targets
        self._sparse: dict[int, tuple[Tensor, Tensor]] = {}  # By storage: a weight and its mask.
        self._at_work: list[tuple[str, Fraction]] = []
        self._in_product = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count the model's operators; those that hide fused products are disabled."""
        with ExitStack() as scope:
            for module in self._rows:
                scope.callback(module.register_forward_pre_hook(self._start, with_kwargs=True).remove)
                scope.callback(module.register_forward_hook(self._stop).remove)
                if isinstance(module, RealWeights):
                    scope.callback(module.register_forward_hook(self._remember).remove)
                elif (mask := getattr(module, "edge_mask", None)) is not None:  # a dense product of a compact model
                    weight = module.get_buffer("weight")
                    self._sparse[weight.untyped_storage().data_ptr()] = (weight, mask)
            for graph in self._counted_targets:
                scope.callback(graph.propagation.register_forward_hook(partial(self._listen, graph)).remove)
            scope.enter_context(_without_fused_products(self._rows))
            scope.enter_context(self)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator that does not decompose into others."""
        kwargs = kwargs or {}
        if func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if self._in_product:
            return result
        if (count := operations(func, args, kwargs, result)) and self._at_work:
            name, share = self._at_work[-1]
            self._add(name, count * share * self._real_share((args, kwargs)) / 2)
        name = func.overloadpacket.__name__
        known = func.namespace in ("aten", "prim", "prims") and name not in OPERATORS_WITHOUT_FORMULA
        if known or func.overloadpacket in flop_registry:
            return result
        if any(isinstance(value, Tensor) and value.is_floating_point() for value in tree_leaves(result)):
            raise InputError(
                f"the multiply-adds of the operator {func.namespace}::{name} are unknown: use a module without "
                "it, or register a formula with torch.utils.flop_counter.register_flop_formula"
            )
        return result

    def _remember(self, real: RealWeights, args: tuple[Tensor], weight: Tensor) -> None:
        mask = torch.empty_like(weight).copy_(real.masks()[0])  # strides like those of the weight
        self._sparse[weight.untyped_storage().data_ptr()] = (weight, mask)

    def _real_share(self, operands: Any) -> Fraction:
        """Return which share of a product's weights is real."""
        share = Fraction(1)
        for operand in tree_leaves(operands):
            if isinstance(operand, Tensor) and operand.untyped_storage().data_ptr() in self._sparse:
                _, mask = self._sparse[operand.untyped_storage().data_ptr()]
                mask = mask.as_strided(operand.size(), operand.stride(), operand.storage_offset())
                share *= Fraction(int(mask.count_nonzero()), mask.numel())
        return share

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        share = Fraction(1)
        if module in self._live:
            # A node function may be applied to some nodes only.
            nodes = next((value for value in (*args, *kwargs.values()) if isinstance(value, range)), None)
            channels = torch.cat([mask[nodes.start : nodes.stop] if nodes else mask for mask in self._live[module]])
            share = Fraction(int(channels.sum()), len(channels))
        self._at_work.append((self._rows[module], share))

    def _stop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._at_work.pop()

    def _add(self, name: str, multiply_adds: Fraction | int) -> None:
        self.counts[name] += multiply_adds  # type: ignore[assignment]

    def _listen(
        self, graph: NeuralGraph, propagation: Propagation, args: tuple[RealEdges, Tensor], propagate: Propagate
    ) -> Propagate:
        """Count the products of one forward pass over a graph's edges."""
        source, target = graph.candidates.pairs(args[0].index)
        counted = self._counted_targets[graph][target]
        return _CountedEdges(propagate, source[counted], target[counted], partial(self._product, self._rows[graph]))

    @contextmanager
    def _product(self, name: str, multiply_adds: int) -> Iterator[None]:
        """Count a product over edges, but not its operators."""
        self._add(name, multiply_adds)
        self._in_product = True
        yield
        self._in_product = False


class _Counted(Propagate):
    """The products of another one."""

    def __init__(self, own: Propagate) -> None:
        super().__init__(own.edges, own.weights)
        self.own, self.first_order = own, own.first_order

    def suited(self, z: Tensor) -> Propagate:
        self.own = self.own.suited(z)
        return self

    def arrange(self, x: Tensor) -> Tensor:
        return self.own.arrange(x)


class _CountedEdges(_Counted):
    """Products over edges, counted as such, block by block."""

    def __init__(
        self, own: Propagate, source: Tensor, target: Tensor, counted: Callable[[int], AbstractContextManager[None]]
    ) -> None:
        super().__init__(own)
        self.source, self.target, self.counted = source, target, counted

    def product(self, number: int, z: Tensor, rows: slice, columns: slice) -> Tensor:
        block = self.blocks[number]
        edges = edges_between(self.source, self.target, block.sources[columns], block.targets[rows])
        with self.counted(edges * math.prod(z.shape[2:])):
            return self.own.product(number, z, rows, columns)


@contextmanager
def _without_fused_products(modules: Mapping[nn.Module, str]) -> Iterator[None]:
    """Make attention and recurrent layers use operators that the counter of every PyTorch version knows."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as scope:
        torch.backends.mha.set_fastpath_enabled(False)
        scope.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        scope.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            scope.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "TF32 acceleration")  # raised when a flag is restored
            scope.enter_context(torch.backends.mkldnn.flags(enabled=False))
            scope.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def layer_uses(layer: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, int, int]:
    """Return the weight of a convolution or linear layer, and the products of each of its numbers for one image.

    Args:
        layer: The layer.
        x: Its input.
        output: Its output.

    Returns:
        The parameter of the weight; products forward and for the gradient of the input; products for its own gradient.
    """
    if parametrize.is_parametrized(layer, "weight"):  # Reading the weight would compute it.
        parameters = layer.get_submodule("parametrizations.weight").parameters(recurse=False)
        weight: Tensor = max(parameters, key=Tensor.numel)  # weight_norm has the lengths of the rows besides.
    else:
        weight = cast(Tensor, layer.weight)
    uses = output[0].numel() // len(weight)
    through, to_weight = _passes(weight, x.requires_grad)
    return weight, uses * through, uses * to_weight


def _passes(weight: Tensor, to_source: bool) -> tuple[int, int]:
    """Return how many times a product runs: forward and for the gradient of its source; and for that of its weight."""
    backward = torch.is_grad_enabled()
    return 1 + (backward and to_source), backward and weight.requires_grad


class GraphStep:
    """The products of one graph for one image of a training step.

    Attributes:
        edges: The real edges of the step.
        through_edges: Products forward, and backward to the states, as if every candidate were real.
        to_weights: Products for the gradient of the weights, likewise.
    """

    def __init__(self) -> None:
        self.edges: RealEdges | None = None
        self.forget()

    def forget(self) -> None:
        """Reset the counts."""
        self.through_edges = 0
        self.to_weights = 0

    def listen(self, propagate: Propagate) -> Propagate:
        """Wrap the product over the edges to count it."""
        return _CountedStep(self, propagate)

    def count(self, weight: Tensor, products: int, to_source: bool) -> None:
        """Add the products of a block."""
        through, to_weights = _passes(weight, to_source)
        self.to_weights += products * to_weights
        self.through_edges += products * through

    def multiply_adds(self) -> float:
        """Return the multiply-adds of the step for its real edges, and for the candidates that get a gradient."""
        edges = self.edges
        if edges is None:
            return 0
        passes = edges.index.numel() * self.through_edges + edges.num_learning * self.to_weights
        return passes / edges.candidates.num_candidates


class LayersStep:
    """The products of layers whose weights are ranked together, in steps of training. A step waits for no device.

    Args:
        graph: The graph of the weights.

    Attributes:
        uses: By weight, the products of a real edge for one image: forward, and backward to the layer's input; and
            those of an edge that gets a gradient, for this gradient.
    """

    def __init__(self, graph: WeightGraph) -> None:
        self.graph = graph
        self.uses: dict[LayerWeight, tuple[int, int]] = {}
        self._edges: Tensor | None = None
        self._sum: Tensor | int = 0

    def count(self, weight: LayerWeight, through: int, to_weight: int) -> None:
        """Add the uses of a call of a layer."""
        before = self.uses.get(weight, (0, 0))
        self.uses[weight] = before[0] + through, before[1] + to_weight

    def see_edges(self) -> None:
        """Take the edges of the last forward pass for those of the step."""
        self._edges = self.graph.edges_in_pass()

    def add(self, images: int, parts: int) -> None:
        """Add a step.

        Args:
            images: Number of images.
            parts: Number of passes among which they are divided.
        """
        edges = self.graph.edges_in_pass() if self._edges is None else self._edges
        uses = torch.tensor([self.uses.get(weight, (0, 0)) for weight in self.graph.weights])
        self._sum = self._sum + (edges * uses.T.to(edges.device, non_blocking=True)).sum() * images // parts
        self._edges = None

    def multiply_adds(self) -> int:
        """Return the multiply-adds of all steps. Synchronises."""
        return int(self._sum)


class _CountedStep(_Counted):
    """The products of a training step."""

    def __init__(self, counter: GraphStep, own: Propagate) -> None:
        super().__init__(own)
        self.counter = counter

    def product(self, number: int, z: Tensor, rows: slice, columns: slice) -> Tensor:
        pairs = (rows.stop - rows.start) * (columns.stop - columns.start)
        self.counter.count(self.weights[number], pairs * math.prod(z.shape[2:]), z.requires_grad)
        return self.own.product(number, z, rows, columns)

    def start(self, feeding: Sequence[slice]) -> States:
        return _CountedStates(self.counter, self.own, feeding)


class _CountedStates(States):
    """The states of a static graph, as the propagation stores them, so that counting needs no extra memory."""

    def __init__(self, counter: GraphStep, propagate: Propagate, feeding: Sequence[slice]) -> None:
        self.counter, self.weights, self.feeding = counter, propagate.weights, feeding
        self.own = propagate.start(feeding)
        self.learning: list[bool] = []

    def receive(self, number: int, z: Tensor) -> Tensor:
        self.learning.append(z.requires_grad)
        weight = self.weights[number]
        products = weight.numel() * math.prod(z.shape[2:])
        self.counter.count(weight, products, any(self.learning[self.feeding[number]]))
        return self.own.receive(number, z)
