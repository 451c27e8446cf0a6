"""Chooses the real weights once per forward pass, and computes the values that layers use."""

from __future__ import annotations

import inspect
import itertools
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.fx import Proxy

from dnw_graph._compat import calls_in_progress, forward_pre_hooks, frames_of
from dnw_graph.arguments import refuse_replica, wrong
from dnw_graph.candidates import Probed
from dnw_graph.errors import InputError
from dnw_graph.ops.layout import plain_eager, traced
from dnw_graph.propagation.gradient import masked_weights
from dnw_graph.sparse_layers.layer_edges import LayerEdges
from dnw_graph.sparse_layers.layers import LayerWeight
from dnw_graph.sparse_layers.reading import ReadWeight
from dnw_graph.sparse_layers.weight_graph import Masks, WeightGraph
from dnw_graph.wirings import Wiring


class RealWeights(Probed):
    """Parametrization of one parameter: its real weights, and zero for the hallucinated ones.

    Args:
        weights: The sparse parts of the parameter: all of it, or some of the three projections of ``in_proj_weight``.
        graphs: The graph of each part.
        owned: The graphs registered here; a graph of several layers is registered in the first of them.
        order: Names of the layer's own parameters before any became sparse.
        over_edges: Whether the layer has a forward pass over edges alone, see ``over_edges``.

    Attributes:
        current: The real weights of the running forward pass, see :meth:`assemble`; None if none is running.
    """

    def __init__(
        self,
        weights: Sequence[LayerWeight],
        graphs: Sequence[WeightGraph],
        owned: Sequence[WeightGraph],
        order: tuple[str, ...],
        over_edges: bool = False,
    ) -> None:
        super().__init__()
        self.over_edges = over_edges
        self.owned: Any = nn.ModuleList(owned)
        self.parts = tuple(zip(weights, graphs, strict=True))
        self.order = order
        self.current: Masks | None = None
        self.active = True  # Until ``densify``.
        self.look = ForwardPass([self])
        self.register_state_dict_pre_hook(_refuse_pretrained)

    @property
    def edges(self) -> LayerEdges | None:
        """The real weights as edges during a forward pass, where the layer computes over them alone."""
        current = self.current  # Read once: another thread may end its forward pass now.
        real = current and current[0]
        return real if isinstance(real, LayerEdges) else None

    def values_at(self, index: Int[Tensor, " edges"]) -> Float[Tensor, " edges"]:
        """Return the values of edges in a forward pass."""
        ((weight, graph),) = self.parts
        return graph.wiring.values(graph.guarded(weight.parameter).reshape(-1).index_select(0, index))

    def forward(self, weight: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        """Return the weight that the layer computes with."""
        if self.current is not None or traced():
            return self._real(weight)
        if torch.is_inference_mode_enabled():
            # Tensors made in inference mode do not record writes.
            with torch.inference_mode(False), torch.no_grad():
                return ReadWeight.of(self._real(weight), self.name, weight)
        return ReadWeight.of(self._real(weight), self.name, weight)

    def _real(self, weight: Tensor) -> Tensor:
        return masked_weights(self._values(weight), *self.masks(), self.probe)

    def masks(self) -> tuple[Float[Tensor, "rows ..."], Float[Tensor, "rows ..."] | None]:
        """Return the masks of :meth:`assemble`, of the running forward pass or else of evaluation."""
        real, learning = self.current or self.look.masks(begins_pass=False)[0]
        return (real.mask, real.mask) if isinstance(real, LayerEdges) else (real, learning)

    def _values(self, weight: Tensor) -> Tensor:
        for _, graph in self.parts:
            weight = graph.guarded(weight)
        rules = [graph.wiring for _, graph in self.parts]
        if self.parts[0][0].third is None:
            return rules[0].values(weight)
        if all(type(rule).values is Wiring.values for rule in rules):
            return weight
        own = {part.third: rule for (part, _), rule in zip(self.parts, rules, strict=True)}
        thirds = enumerate(weight.chunk(3))
        return torch.cat([own[third].values(rows) if third in own else rows for third, rows in thirds])

    @property
    def kind(self) -> str:
        """Which weights get a gradient: ``"all"``, the ``"real"`` ones, or a set of their ``"own"``."""
        kinds = {graph.wiring.gradient or graph.wiring.trained for _, graph in self.parts}
        return kinds.pop() if len(kinds) == 1 else "own"

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        first = self.parts[0][0]
        return first.name if first.third is None else first.name.rpartition(".")[0]

    def right_inverse(self, weight: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        """Make an assigned weight the candidates.

        Raises:
            InputError: If it has another shape.
        """
        self.take(weight)
        return weight.detach().clone()

    def take(self, weight: Tensor) -> None:
        """Prepare to replace the candidates."""
        shape = self.parts[0][0].parameter.shape
        if weight.shape != shape:
            raise wrong(self.name, f"a weight of {list(shape)}, or densify(…) the model first", weight)
        for _, graph in self.parts:
            graph.forget()

    def assemble(self, found: Mapping[LayerWeight, Masks]) -> Masks:
        """Assemble the parameter's masks from those of its parts; dense projections count as real.

        Returns:
            Two masks: 1 for real weights; 1 for those that get a gradient (None if all do, the same tensor if only the
            real ones do). Or the real weights as edges, and None.
        """
        if self.parts[0][0].third is None:
            return found[self.parts[0][0]]
        mask = self._whole(found, 0)
        if self.kind == "all":
            return mask, None
        return mask, mask if self.kind == "real" else self._whole(found, 1)

    def _whole(self, found: Mapping[LayerWeight, Masks], number: int) -> Tensor:
        first = self.parts[0][0]
        dense = first.parameter.new_ones(first.shape)
        masks: Any = {weight.third: found[weight][number] for weight, _ in self.parts}
        return torch.cat([dense if masks.get(third) is None else masks[third] for third in range(3)])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "current": None}


def part(below: Collection[RealWeights], others: Iterable[RealWeights] = ()) -> None:
    """Split rankings, so that some parameters are no longer ranked together with others.

    Args:
        below: The parameters.
        others: Parameters that may share a ranking with them.
    """
    for graph in dict.fromkeys(graph for real in (*below, *others) for _, graph in real.parts):
        leaving = [weight for weight in graph.weights if weight.holder not in below]
        if 0 < len(leaving) < len(graph.weights):
            own = graph.part(leaving)
            for holder in dict.fromkeys(weight.holder for weight in leaving):
                holder.parts = tuple((weight, own if weight in leaving else of) for weight, of in holder.parts)
                holder.owned = nn.ModuleList(each for each in holder.owned if each is not graph)
            leaving[0].holder.owned.append(own)
            first = graph.weights[0].holder
            if graph not in first.owned:
                first.owned.append(graph)


def _refuse_pretrained(real: RealWeights, *_: Any) -> None:
    """Refuse a save that ``from_pretrained`` could not load: it would make a dense model and redraw the weight."""
    for frame in frames_of(inspect.currentframe()):
        if frame.f_code.co_name == "save_weights":  # What it writes is complete, for the hub too.
            return
        if frame.f_code.co_name == "save_pretrained":
            raise InputError(
                f"{real.name} is sparse, and from_pretrained would not find it: call "
                "save_pretrained(…, state_dict=dense_state_dict(model)), or densify(…) a copy of the model first"
            )


class ForwardPass:
    """Chooses the real weights below a module when its forward pass begins, unless an outer one has begun.

    Args:
        weights: The sparse parameters below the module.
        module: The module, to notice which layers are no longer below it.
        splits: Whether such layers leave the rankings that they share with others.
    """

    def __init__(
        self, weights: Sequence[RealWeights], module: nn.Module | None = None, *, splits: bool = False
    ) -> None:
        self._weights, self._splits = tuple(weights), splits
        self._links = () if module is None else self._find_links(module)
        self.calls = 0
        self._thread = 0
        self._register()

    def _register(self) -> None:
        self.token = str(next(_TOKENS))
        _PASSES[self.token] = self

    @property
    def weights(self) -> list[RealWeights]:
        """The sparse parameters below the module, except those made dense again."""
        return [weight for weight in self._weights if weight.active]

    def _find_links(self, module: nn.Module) -> tuple[tuple[nn.Module, str, nn.Module], ...]:
        """Return parents, names and children on the paths to the layers."""
        layers = {weight.layer for real in self._weights for weight, _ in real.parts}
        found: dict[tuple[nn.Module, str, nn.Module], None] = {}
        for path, layer in module.named_modules(remove_duplicate=False):
            if layer in layers:
                parent = module
                for name in filter(None, path.split(".")):
                    child = getattr(parent, name)
                    found[parent, name, child] = None
                    parent = child
        return tuple(found)

    def settle(self, module: nn.Module, *_: Any) -> None:
        """Hook of the module: let go of layers that are no longer below it, and of a pass that was interrupted."""
        if self.calls and self._thread == threading.get_ident() and not calls_in_progress(module):
            self._clear()
        if all(getattr(parent, name, None) is child for parent, name, child in self._links):
            return
        inside = set(module.modules())
        gone = [weight for weight in self.weights if weight not in inside]
        self._weights = tuple(weight for weight in self._weights if weight in inside)
        self._links = self._find_links(module)
        for each in inside - {module}:
            for hook in forward_pre_hooks(each):
                if isinstance(below := getattr(hook, "__self__", None), ForwardPass):
                    below.settle(each)
        if self._splits and self._weights:
            part(self._weights, gone)

    def begin(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the module.

        Raises:
            InputError: If the module is a replica that ``nn.DataParallel`` made on another device.
        """
        refuse_replica(module)
        if self.calls:
            if calls_in_progress(module) > 1:  # It calls itself.
                self.calls += 1
                return
            # After KeyboardInterrupt no hook was called. Layers in another thread's evaluation read their weights now.
            self._clear()
        if self._in_pass():
            return
        self.settle(module)
        weights = self.weights
        if not weights or self._in_pass() or any(isinstance(each, Proxy) for each in args):
            return  # torch.fx records the calls of layers, which choose when the recorded graph runs.
        for weight, masks in zip(weights, self.masks(begins_pass=True), strict=True):
            weight.current = masks
        self.calls = 1
        if not torch.compiler.is_compiling():
            self._thread = threading.get_ident()

    def end(self, *_: Any) -> None:
        """Forward hook of the module."""
        if self.calls == 1:
            self._clear()
        elif self.calls:
            self.calls -= 1

    def _in_pass(self) -> bool:
        """Return whether a forward pass is running, of an outer module."""
        for weight in self._weights:
            if weight.active:
                return weight.current is not None
        return False

    def _clear(self) -> None:
        self.calls = 0
        for weight in self.weights:
            weight.current = None

    def masks(self, begins_pass: bool) -> list[Masks]:
        """Return the masks of each parameter, see :meth:`RealWeights.assemble`; one operator for a compiler."""
        parameters = [weight.parameter for graph in self.graphs() for weight in graph.weights]
        if not torch.compiler.is_compiling():
            return self.choose(parameters, begins_pass, as_edges=begins_pass and plain_eager())
        kinds = [weight.kind for weight in self.weights]
        like = [weight.parts[0][0].parameter.detach() for weight in self.weights]
        own = [each for each, kind in zip(like, kinds, strict=True) if kind == "own"]
        detached = [parameter.detach() for parameter in parameters]
        found = torch.ops.dnw_graph.real_masks(detached, [*like, *own], self.token, begins_pass)
        real, learning = found[: len(like)], iter(found[len(like) :])
        return [
            (mask, None if kind == "all" else mask if kind == "real" else next(learning))
            for mask, kind in zip(real, kinds, strict=True)
        ]

    def graphs(self) -> list[WeightGraph]:
        """Return the graphs of the parameters, each once."""
        return list(dict.fromkeys(graph for each in self.weights for _, graph in each.parts))

    def choose(self, parameters: Sequence[Tensor], begins_pass: bool, as_edges: bool = False) -> list[Masks]:
        """Ask every graph for its masks, once.

        Args:
            parameters: The parameters of all graphs as the forward pass sees them.
            begins_pass: Whether a forward pass begins.
            as_edges: Whether layers may compute over edges alone.
        """
        found: dict[LayerWeight, Masks] = {}
        rest = iter(parameters)
        for graph in self.graphs():
            own = list(itertools.islice(rest, len(graph.weights)))
            found |= zip(graph.weights, graph.masks(own, begins_pass, as_edges), strict=True)
        return [weight.assemble(found) for weight in self.weights]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._register()


_TOKENS = itertools.count()
_PASSES: weakref.WeakValueDictionary[str, ForwardPass] = weakref.WeakValueDictionary()


# Stored masks must not be in the memory of a CUDA graph: the compiler captures only the parts around this.
_UNSAFE: Any = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op(
    "dnw_graph::real_masks",
    mutates_args=(),
    schema="(Tensor[] parameters, Tensor[] like, str token, bool begins_pass) -> Tensor[]",
    **_UNSAFE,
)
def _real_masks(parameters: Sequence[Tensor], like: Sequence[Tensor], token: str, begins_pass: bool) -> list[Tensor]:
    """Choose the real weights within a compiled forward pass."""
    if token not in _PASSES:
        raise InputError("the model that was compiled or exported here is gone: call densify(…) before exporting one")
    current = _PASSES[token]
    owned = [weight.parameter for graph in current.graphs() for weight in graph.weights]
    # Compiled code passes aliases; only the parameters themselves show whether they have changed.
    same = all(a.data_ptr() == b.data_ptr() for a, b in zip(owned, parameters, strict=True))
    chosen = current.choose(owned if same else parameters, begins_pass)
    pairs = zip(current.weights, chosen, strict=True)
    own = [learning for weight, (_, learning) in pairs if weight.kind == "own" and learning is not None]
    masks = [*(mask for mask, _ in chosen if isinstance(mask, Tensor)), *own]
    # Copies: compiled code may reuse the memory of what an operator returns.
    return [torch.empty_like(weight).copy_(mask) for weight, mask in zip(like, masks, strict=True)]


@_real_masks.register_fake
def _(parameters: Sequence[Tensor], like: Sequence[Tensor], token: str, begins_pass: bool) -> list[Tensor]:
    # An exported program cannot call the object that chooses. Refused here, where the check is not traced.
    if torch.compiler.is_exporting():
        raise InputError("a module with sparse weights cannot be exported: densify(…) it first, or a copy of it")
    return [torch.empty_like(weight) for weight in like]
