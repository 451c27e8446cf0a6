"""Modules whose forward pass is a fixed network of known layers, such as torchvision's ResNets."""

from __future__ import annotations

import operator
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dnw_graph._compat import has_own_hooks
from dnw_graph.compaction.plain_layers import Activation, Affine, Layer, MapMean, require
from dnw_graph.compaction.sparse_layers import SparseConv, SparseLayer
from dnw_graph.errors import unknown_name
from dnw_graph.usual import as_its_class, keeps_methods


def _max_pool2d(z: Tensor, **options: Any) -> Tensor:
    """Pool in channels-last layout, which is five times as fast on a CPU."""
    return F.max_pool2d(z.contiguous(memory_format=torch.channels_last), **options).contiguous()


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "add": torch.add,
    "avg_pool2d": F.avg_pool2d,
    "concat": lambda *tensors, dim: torch.cat(tensors, dim),
    "flatten": torch.flatten,
    "max_pool2d": _max_pool2d,
    "mean": torch.mean,
    "mul": torch.mul,
}
"""The functions of an :class:`Operation`, by name."""


class Operation(Layer):
    """An operation without parameters on one or several tensors.

    Args:
        name: One of :data:`OPERATIONS`.
        arguments: Further arguments by name: numbers, booleans, lists of them or None.
    """

    options = ("name", "arguments")

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        if name not in OPERATIONS:
            raise unknown_name("operation", name, OPERATIONS)
        require(all(map(_plain, arguments.values())), f"arguments must be plain values; got {reprlib.repr(arguments)}")
        self.name = name
        self.arguments = {key: list(each) if isinstance(each, tuple) else each for key, each in arguments.items()}

    def forward(self, *tensors: Tensor) -> Tensor:
        """Apply it."""
        return OPERATIONS[self.name](*tensors, **self.arguments)


class Network(Layer):
    """A directed acyclic graph of layers; the last one returns the result of the network.

    Args:
        layers: The layers, in the order of their computation.
        inputs: For each layer the numbers of its inputs: 0 is the input of the network, n the result of the n-th layer,
            counted from 1.
    """

    options = ("inputs",)

    def __init__(self, layers: Sequence[nn.Module], inputs: Sequence[Sequence[int]]) -> None:
        super().__init__()
        require(len(layers) == len(inputs) > 0, "a network needs inputs for every layer")
        for number, taken in enumerate(inputs):
            require(
                len(taken) > 0 and all(type(each) is int and 0 <= each <= number for each in taken),
                f"layer {number + 1} must take tensors 0 … {number}; got {reprlib.repr(taken)}",
            )
        self._set(layers, inputs)

    def _set(self, layers: Sequence[nn.Module], inputs: Sequence[Sequence[int]]) -> None:
        self.layers = nn.ModuleList(layers)
        self.inputs = [list(taken) for taken in inputs]
        self._last_use = {each: number for number, taken in enumerate(inputs) for each in taken}

    def forward(self, z: Tensor) -> Tensor:
        """Compute the layers; a result is freed after its last use."""
        held = {0: z}
        for number, (layer, taken) in enumerate(zip(self.layers, self.inputs, strict=True)):
            tensors = [held[each] for each in taken]
            for each in set(taken):
                if self._last_use[each] == number:
                    del held[each]
            z = layer(*tensors)
            del tensors
            held[number + 1] = z
        return z

    def join(self) -> None:
        """Fold norms into the layers before them, and additions and ReLUs into sparse layers."""
        layers: dict[int, nn.Module] = dict(enumerate(self.layers, start=1))
        inputs = dict(enumerate(self.inputs, start=1))
        for place in list(layers):
            layer, taken = layers[place], inputs[place]
            uses = Counter(each for other in inputs.values() for each in other)
            for before in taken:
                if uses[before] > 1 or before not in layers or not isinstance(layer, Layer):
                    continue
                norm_of_rows = isinstance(layer, Affine) and getattr(layers[before], "on_last", False)
                if norm_of_rows and not _returns_vectors(layers, inputs, inputs[before][0]):
                    continue
                others = [each for each in taken if each != before]
                if _absorbed(layer, layers[before], others, len(inputs[before])):
                    layers[place], inputs[place] = layers.pop(before), inputs.pop(before) + others
                    break
        number = {0: 0} | {place: new for new, place in enumerate(layers, start=1)}
        self._set(list(layers.values()), [[number[each] for each in taken] for taken in inputs.values()])


def _absorbed(layer: Layer, last: nn.Module, others: list[int], num_inputs: int) -> bool:
    """Merge the next layer into a layer if possible; return whether it was."""
    if isinstance(layer, Affine):
        return isinstance(last, Layer) and num_inputs == 1 and last.absorb(layer.scale, layer.shift)
    if not isinstance(last, SparseLayer) or last.relu:
        return False
    if isinstance(layer, Activation) and layer.name == "relu":
        last.relu = True
        return True
    added = isinstance(layer, Operation) and layer.name == "add" and not layer.arguments
    return added and isinstance(last, SparseConv) and num_inputs == len(others) == 1


def _returns_vectors(layers: Mapping[int, nn.Module], inputs: Mapping[int, Sequence[int]], place: int) -> bool:
    """Return whether a layer certainly returns vectors, to which a norm behind a linear layer applies as to maps."""
    while isinstance(layer := layers.get(place), Layer):
        if isinstance(layer, Operation):
            return layer.name == "flatten" and layer.arguments in ({"start_dim": 1}, {"start_dim": 1, "end_dim": -1})
        if isinstance(layer, MapMean):
            return True
        place = inputs[place][0]
    return False


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float)


def traced(model: nn.Module, converted: Callable[[nn.Module], Sequence[nn.Module] | None]) -> Network | None:
    """Return a module as a network of plain layers, or None if its forward pass cannot be traced to one.

    Args:
        model: The module.
        converted: Returns the sequence of layers that a module is equivalent to, or None if unknown.
    """
    graph = _trace(model)
    if graph is None:
        return None
    *nodes, output = graph.nodes
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: list[nn.Module] = []
    inputs: list[list[int]] = []
    number: dict[Any, int] = {}
    new: Sequence[nn.Module] | None
    for node in nodes:
        if node.op == "placeholder":
            number[node] = 0
            continue
        taken, new = _called(node)
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            module = modules[str(node.target)]
            if not (getattr(module, "inplace", False) and len(node.args[0].users) > 1):
                taken, new = node.args, _pooling(module) or converted(module)
        if new is None or not all(isinstance(each, fx.Node) and each in number for each in taken):
            return None
        places = [number[each] for each in taken]
        for layer in new:
            layers.append(layer)
            inputs.append(places)
            places = [len(layers)]
        number[node] = places[0]
    (result,) = output.args
    return Network(layers, inputs) if layers and number.get(result) == len(layers) else None


def norms_behind(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return, for each module whose result is used once, the module that uses it, as far as known."""
    graph = _trace(model)
    if graph is None:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [(modules[str(node.target)], node) for node in graph.nodes if node.op == "call_module"]
    times = Counter(module for module, _ in calls)
    by_node = {node: module for module, node in calls if times[module] == 1}
    found = {}
    for node, module in by_node.items():
        (user, *others) = node.users or [None]
        if user in by_node and not others and user.args == (node,) and not user.kwargs:
            found[module] = by_node[user]
    return found


def _trace(model: nn.Module) -> fx.Graph | None:
    """Return the calls in a module's forward pass on one tensor, or None if they depend on values."""
    # The tracer follows the class's forward pass.
    if not keeps_methods(model) or any(map(has_own_hooks, model.modules())):
        return None
    try:
        graph = _Tracer().trace(model)
    except Exception:  # A forward pass on symbolic tensors can fail anywhere.
        return None
    # With further arguments, such as optional ones, the calls may depend on which are given.
    return graph if sum(node.op == "placeholder" for node in graph.nodes) == 1 else None


class _TensorProxy(fx.Proxy):
    """Is taken for a tensor by a forward pass that looks at the type of its input."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return Tensor


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for the result of a call."""
        return _TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Return an argument as the graph has it; the base class would take the proxy for a constant."""
        return a.node if type(a) is _TensorProxy else super().create_arg(a)


def _pooling(module: nn.Module) -> list[Layer] | None:
    """Return a module without parameters as an operation, or None if unknown."""
    kind = type(module)
    names: tuple[str, ...]
    if not as_its_class(module):
        return None
    if kind is nn.MaxPool2d and not getattr(module, "return_indices", False):
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    elif kind is nn.AvgPool2d:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    elif kind is nn.AdaptiveAvgPool2d:
        names = ("output_size",)
    elif kind is nn.Flatten:
        names = ("start_dim", "end_dim")
    else:
        return None
    name = {nn.MaxPool2d: "max_pool2d", nn.AvgPool2d: "avg_pool2d", nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d"}
    return [Operation(name.get(kind, "flatten"), {each: getattr(module, each) for each in names})]


_PAIRS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.mul: "mul",
    torch.mul: "mul",
}
_ACTIVATIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid"}


def _called(node: Any) -> tuple[Sequence[Any], list[Layer] | None]:
    """Return the inputs and the layers of a call of a function or method; None if unknown."""
    args, kwargs = list(node.args), dict(node.kwargs)
    name = node.target if node.op == "call_method" else None
    function = node.target if node.op == "call_function" else None
    if function is operator.iadd and len(args[0].users) > 1:
        return args, None
    pair = {"add": "add", "mul": "mul"}.get(str(name)) or _PAIRS.get(function)
    if pair and len(args) == 2 and not kwargs:
        return args, [Operation(pair, {})]
    activation = _ACTIVATIONS.get(function) or {"relu": "relu", "sigmoid": "sigmoid"}.get(str(name))
    if activation and len(args) == 1 and not kwargs.pop("inplace", False) and not kwargs:
        return args, [Activation(activation)]
    if function is torch.cat and args and isinstance(args[0], list | tuple) and kwargs.keys() <= {"dim"}:
        return list(args[0]), [Operation("concat", {"dim": kwargs.get("dim", args[1] if len(args) > 1 else 0)})]
    named: dict[Any, tuple[str, tuple[str, ...]]] = {
        torch.flatten: ("flatten", ("start_dim", "end_dim")),
        "flatten": ("flatten", ("start_dim", "end_dim")),
        F.adaptive_avg_pool2d: ("adaptive_avg_pool2d", ("output_size",)),
        "mean": ("mean", ("dim", "keepdim")),
        torch.mean: ("mean", ("dim", "keepdim")),
    }
    if (found := named.get(name or function)) and args:
        given = dict(zip(found[1], args[1:], strict=False)) | kwargs
        if given.keys() <= set(found[1]) and all(map(_plain, given.values())):
            return args[:1], [Operation(found[0], given)]
    return args, None
