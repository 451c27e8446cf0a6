"""Counts the multiply-adds of a forward pass and says which module computed them."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dnw_graph.ops.flops  # noqa: F401
from dnw_graph._compat import OPERATORS_WITHOUT_FORMULA, TorchDispatchMode, tree_leaves
from dnw_graph.errors import InputError
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.propagation import Propagate, Propagation, RealEdges
from dnw_graph.sparse_layers.forward_pass import RealWeights

aten = torch.ops.aten

# Products with a vector, which PyTorch's counter leaves out: two operations per multiply-add.
_VECTOR_FORMULAS = {
    aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
    aten.addmv: lambda _, matrix, *__, **___: 2 * math.prod(matrix),
    aten.dot: lambda vector, *_, **__: 2 * math.prod(vector),
}


class MultiplyAdds(TorchDispatchMode):
    """A context in which the multiply-adds of a model's forward pass are counted.

    PyTorch's ``FlopCounterMode`` counts the operators; each count is booked on the module at work, times the share of
    live channels among those that it computes. The product over a graph's edges is counted here: one multiply-add per
    counted real edge and place, however many an implementation computes with zeros.

    Args:
        rows: The name under which to book each module of the model.
        live: Modules of which some channels may be dead, with the masks of their live channels: one for each place
            where the module is used.
        counted_targets: For every graph, the nodes whose incoming real edges are counted.

    Attributes:
        counts: Multiply-adds by name.

    Raises:
        InputError: In the forward pass, if an operator multiplies and nothing tells how often.
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
        self._operators = FlopCounterMode(display=False, custom_mapping=_VECTOR_FORMULAS)
        self._operations = Fraction(0)  # of all operators, when they were last booked
        self._left_out = Fraction(0)  # of these, what was multiplied by hallucinated weights of sparse layers
        self._sparse: dict[int, tuple[Tensor, Tensor]] = {}  # by storage: the weight of a layer, and which are real
        self._at_work: list[tuple[str, Fraction]] = []
        self._in_product = False
        self._scope = ExitStack()

    def __enter__(self) -> MultiplyAdds:
        """Start to count; operators that fuse products and so hide them are switched off."""
        with ExitStack() as scope:
            for module in self._rows:
                scope.callback(module.register_forward_pre_hook(self._start, with_kwargs=True).remove)
                scope.callback(module.register_forward_hook(self._stop).remove)
                if isinstance(module, RealWeights):
                    scope.callback(module.register_forward_hook(self._remember).remove)
            for graph in self._counted_targets:
                scope.callback(graph.propagation.register_forward_hook(partial(self._listen, graph)).remove)
            scope.enter_context(_without_fused_products(self._rows))
            super().__enter__()
            scope.push(super().__exit__)
            scope.enter_context(self._operators)
            self._scope = scope.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave no hook and no setting behind."""
        self._scope.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at every operator that PyTorch's counter has split as far as it could."""
        result = func(*args, **(kwargs or {}))
        if not self._in_product and func.overloadpacket in self._operators.flop_registry:
            self._leave_out(func.overloadpacket, args, kwargs or {}, result)
        name = func.overloadpacket.__name__
        known = func.namespace in ("aten", "prim", "prims") and name not in OPERATORS_WITHOUT_FORMULA
        if known or self._in_product or func.overloadpacket in flop_registry:
            return result
        if any(isinstance(value, Tensor) and value.is_floating_point() for value in tree_leaves(result)):
            raise InputError(
                f"the multiply-adds of the operator {func.namespace}::{name} are unknown: use a module without "
                "it, or register a formula with torch.utils.flop_counter.register_flop_formula"
            )
        return result

    def _remember(self, real: RealWeights, args: tuple[Tensor], weight: Tensor) -> None:
        mask = torch.empty_like(weight).copy_(real.current_mask())  # strides like those of the weight
        self._sparse[weight.untyped_storage().data_ptr()] = (weight, mask)

    def _leave_out(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note the operations of a product with the hallucinated weights of a sparse layer."""
        for operand in tree_leaves((args, kwargs)):
            if isinstance(operand, Tensor) and operand.untyped_storage().data_ptr() in self._sparse:
                _, mask = self._sparse[operand.untyped_storage().data_ptr()]
                mask = mask.as_strided(operand.size(), operand.stride(), operand.storage_offset())
                operations = self._operators.flop_registry[operator](*args, **kwargs, out_val=result)
                self._left_out += Fraction(operations * int((mask == 0).sum()), mask.numel())

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._book()
        share = Fraction(1)
        if module in self._live:
            # A node function can be applied to a part of its nodes.
            nodes = next((value for value in (*args, *kwargs.values()) if isinstance(value, range)), None)
            channels = torch.cat([mask[nodes.start : nodes.stop] if nodes else mask for mask in self._live[module]])
            share = Fraction(int(channels.sum()), len(channels))
        self._at_work.append((self._rows[module], share))

    def _stop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._book()
        self._at_work.pop()

    def _book(self) -> None:
        """Book what was computed since the last call on the module at work."""
        operations = self._operators.get_total_flops() - self._left_out
        if self._at_work and not self._in_product:
            name, share = self._at_work[-1]
            self._add(name, share * (operations - self._operations) / 2)
        self._operations = operations

    def _add(self, name: str, multiply_adds: Fraction | int) -> None:
        self.counts[name] += multiply_adds  # type: ignore[assignment]

    def _listen(
        self, graph: NeuralGraph, propagation: Propagation, args: tuple[RealEdges, Tensor], propagate: Propagate
    ) -> Propagate:
        """Count the products of one forward pass over a graph's edges."""
        source, target = graph.candidates.pairs(args[0].index)
        counted = self._counted_targets[graph][target]
        source, target = source[counted], target[counted]

        def product(number: int, z: Tensor, rows: slice, columns: slice) -> Tensor:
            block = propagate.blocks[number]
            sources, targets = block.sources[columns], block.targets[rows]
            used = (source >= sources.start) & (source < sources.stop)
            used &= (target >= targets.start) & (target < targets.stop)
            self._add(self._rows[graph], int(used.sum()) * math.prod(z.shape[2:]))
            self._book()
            self._in_product = True
            result = propagate.product(number, z, rows, columns)
            self._book()
            self._in_product = False
            return result

        return replace(propagate, product=product, states=None)


@contextmanager
def _without_fused_products(modules: Mapping[nn.Module, str]) -> Iterator[None]:
    """Have attention and recurrent layers computed by operators that PyTorch's counter knows in every version."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as scope:
        torch.backends.mha.set_fastpath_enabled(False)
        scope.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        scope.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            scope.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "TF32 acceleration")  # of setting a flag to what it was
            scope.enter_context(torch.backends.mkldnn.flags(enabled=False))
            scope.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
