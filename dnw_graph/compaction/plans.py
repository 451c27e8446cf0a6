"""Static graphs of a compact model, with the layers around them, in one kernel call.

The call includes a convolution before the graph, and a ReLU, the mean over maps and a linear layer after it. With
hooks, gradients, autocast, compilers, and on other devices or dtypes, layers are called one by one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dnw_graph._compat import has_hooks, version
from dnw_graph.compaction.plain_layers import Activation, Conv, Linear, MapMean
from dnw_graph.compaction.static_graphs import FusedGraph
from dnw_graph.ops.call import readable
from dnw_graph.ops.layout import plain_eager
from dnw_graph.ops.static_plan import Ends, StaticPlan
from dnw_graph.usual import keeps_methods

_RUNS: weakref.WeakKeyDictionary[nn.Module, tuple[list[nn.Module], dict[int, Run]]] = weakref.WeakKeyDictionary()


def apply(model: nn.Module, layers: Sequence[nn.Module], z: Tensor) -> Tensor:
    """Apply the layers of a model in sequence; those of a run in one call where the result is the same."""
    runs = _runs(model, list(layers)) if plain_eager() and not torch.is_autocast_enabled("cpu") else {}
    place = 0
    while place < len(layers):
        run = runs.get(place)
        out = None if run is None else run(z)
        if run is None or out is None:
            z = layers[place](z)
            place += 1
        else:
            z = out
            place += len(run.layers)
    return z


def _runs(model: nn.Module, layers: list[nn.Module]) -> dict[int, Run]:
    """Return the runs among the layers by the index of their first layer."""
    known, runs = _RUNS.get(model, ([], {}))
    if not _same(known, layers):
        found = [_run(layers, place) for place, layer in enumerate(layers) if isinstance(layer, FusedGraph)]
        runs = {layers.index(run.layers[0]): run for run in found}
        _RUNS[model] = layers, runs
    return runs


class Run:
    """Consecutive layers that include a static graph.

    Args:
        stem: The convolution before the graph, if there is one.
        graph: The graph.
        behind: ReLU, mean and linear layer after it, if present.
    """

    def __init__(self, stem: Conv | None, graph: FusedGraph, behind: Sequence[nn.Module]) -> None:
        self.stem = stem
        self.graph = graph
        self.behind = behind
        self.layers = [*([] if stem is None else [stem]), graph, *behind]
        # Tensors, aliases that keep their memory from being used again, versions, and the plan made for them.
        self._made: tuple[list[Tensor], list[Tensor], list[int], StaticPlan | None] = [], [], [], None

    def __call__(self, z: Tensor) -> Tensor | None:
        """Return the result of the layers for z, or None if they have to be called one by one."""
        channels = self.graph.num_inputs if self.stem is None else self.stem.num_inputs
        if not (isinstance(z, Tensor) and readable(z) and z.dim() == 4 and z.size(1) == channels and z.numel()):
            return None
        tensors = [tensor for layer in self.layers for tensor in layer.buffers(recurse=False)]
        if any(tensor.is_floating_point() and tensor.dtype != z.dtype for tensor in tensors):
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (z, *tensors)):
            return None
        if any(has_hooks(layer) or not keeps_methods(layer) for layer in self.layers):
            return None
        plan = self._plan(tensors)
        return None if plan is None else plan(z)

    def _plan(self, tensors: list[Tensor]) -> StaticPlan | None:
        """Return the plan for the current tensors; a cached one unless they have changed."""
        versions = [version(tensor) for tensor in tensors]
        held, aliases, old, plan = self._made
        replaced = any(alias.data_ptr() != tensor.data_ptr() for alias, tensor in zip(aliases, tensors, strict=False))
        if not _same(held, tensors) or old != versions or replaced:
            countable = all(number >= 0 and readable(tensor) for number, tensor in zip(versions, tensors, strict=True))
            plan = self._new_plan() if countable else None
            self._made = tensors, [tensor.detach() for tensor in tensors], versions, plan
        return plan

    def _new_plan(self) -> StaticPlan | None:
        graph = self.graph
        linear = self.behind[-1] if self.behind and isinstance(self.behind[-1], Linear) else None
        ends = Ends(
            stem=None if self.stem is None else self.stem.weight,
            stem_bias=None if self.stem is None else self.stem.bias,
            stem_stride=1 if self.stem is None else self.stem.stride[0],
            shift=graph.output_shift,
            relu=any(isinstance(layer, Activation) for layer in self.behind),
            mean=any(isinstance(layer, MapMean) for layer in self.behind),
            weight=None if linear is None else linear.weight,
            bias=None if linear is None else linear.bias,
        )
        return StaticPlan.make(graph.sizes, graph.strides, graph.tensors(), graph.rounding, ends)


def _run(layers: list[nn.Module], place: int) -> Run:
    """Return the static graph at an index with the layers around it that a plan supports."""
    graph = layers[place]
    assert isinstance(graph, FusedGraph)
    before = layers[place - 1] if place else None
    stem = before if isinstance(before, Conv) and _is_stem(before) and before.num_outputs == graph.num_inputs else None
    behind: list[nn.Module] = []
    for layer in layers[place + 1 :]:
        last = type(behind[-1]) if behind else FusedGraph
        relu = isinstance(layer, Activation) and layer.name == "relu" and last is FusedGraph
        mean = (
            isinstance(layer, MapMean) and (layer.start, layer.stop) == (0, None) and last in (FusedGraph, Activation)
        )
        linear = isinstance(layer, Linear) and last is MapMean and layer.weight.size(1) == graph.num_outputs
        if not (relu or mean or linear):
            break
        behind.append(layer)
    return Run(stem, graph, behind)


def _is_stem(conv: Conv) -> bool:
    square = conv.stride in ([1, 1], [2, 2]) and conv.padding == [1, 1] and conv.dilation == [1, 1]
    return square and conv.groups == 1 and conv.weight.shape[2:] == (3, 3)


def _same(these: Sequence[object], those: Sequence[object]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))
