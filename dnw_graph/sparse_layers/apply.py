"""sparsify: sparse weights for the layers of any module."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dnw_graph._compat import frames_of
from dnw_graph.arguments import checked
from dnw_graph.candidates import split_index
from dnw_graph.errors import InputError
from dnw_graph.sparse_layers.access import sparse_chain, sparse_parameters
from dnw_graph.sparse_layers.budget import DISTRIBUTIONS, edges_per_weight, kept
from dnw_graph.sparse_layers.eligible import Skip, names_of_owners, reasons_to_skip, refuse_module, refuse_weights
from dnw_graph.sparse_layers.forward_pass import ForwardPass, RealWeights
from dnw_graph.sparse_layers.layer_edges import suits
from dnw_graph.sparse_layers.layers import LayerWeight, find_weights, own_parameters
from dnw_graph.sparse_layers.over_edges import over_edges
from dnw_graph.sparse_layers.reading import ReadWeight, name_of_candidates
from dnw_graph.sparse_layers.state import before_loading
from dnw_graph.sparse_layers.table import SparsityRow, SparsityTable
from dnw_graph.sparse_layers.weight_graph import WeightGraph
from dnw_graph.wirings import TargetedDropout, Wiring
from dnw_graph.wirings.prune_and_grow import PruneAndGrow


@checked
def sparsify(
    module: nn.Module,
    density: float | None = None,
    wiring: str | Wiring = "dnw",
    skip: Skip | Iterable[Skip] = (),
    distribution: str | Mapping[str, float] = "uniform",
    *,
    sparse_kernels: bool = True,
) -> SparsityTable:
    r"""Make the layers of a module sparse; training discovers which weights are used.

    Section 3.4 of the paper. Every weight tensor of a linear layer, a convolution, a transposed convolution or an
    attention projection becomes a graph: its entries are the candidates, k of them are real, and the others are zero in
    the forward pass. With the rule ``"dnw"`` all of them get the dense gradient. Biases, norms and everything else
    stay unchanged. The module is changed in place; its parameters stay the same objects, so you can create the
    optimiser before or after; :func:`dnw_graph.attach` adds the parameters of a rule, such as the thresholds of
    ``"str"``. :func:`densify` restores plain parameters.

    In training the real weights are chosen once per forward pass of the outermost module called; in evaluation when the
    weights have changed, as in :class:`~dnw_graph.NeuralGraph`. Reading a weight outside of a forward pass returns the
    real weights of evaluation; its gradient and its hooks are those of all candidates. Writing to it, as ``nn.init``
    and ``layer.reset_parameters()`` do, raises an error: initialise first, assign a new weight, or write to
    ``layer.parametrizations.weight.original``.

    Args:
        module: The module.
        density: Share of weights to keep: k = n - ⌊(1 - density) · n⌋ of n, at least 1. Default: 0.1, or the
            density of the rule (``"nm"``).
        wiring: The rule: a name or a :class:`~dnw_graph.wirings.Wiring`, which is copied for every weight.
        skip: What stays dense: name patterns (``*`` and ``?``) of modules or parameters, and types of modules, with
            everything inside such modules.
        distribution: How the budget is divided: ``"uniform"``, ``"erdos_renyi"``, ``"erdos_renyi_kernel"``,
            ``"global"`` (one ranking of all weights), or a mapping from patterns of weight names to densities. See
            ``dnw_graph.sparse_layers.budget``.
        sparse_kernels: On a CPU, whether layers whose hallucinated weights get no gradient compute over their real
            weights alone, in the forward and backward pass, where ``dnw_graph.sparse_layers.layer_edges.pays`` is true.
            The edges are the same; results are equal up to rounding. False: always use a dense weight.

    Returns:
        A table of all parameters with two or more dimensions, sparse or dense.

    Raises:
        InputError: If a density is out of range, a name or pattern is unknown, there is nothing to make sparse, a
            weight is already sparse, shared by two layers, lazy, quantised or without values, a layer computes with
            other values than its weight's (see :func:`register_layer`), or the module is wrapped in
            ``DistributedDataParallel`` of several processes. Nothing is changed then.

    Examples:
        >>> from torch import nn
        >>> from dnw_graph.sparse_layers import sparsify
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
        >>> print(sparsify(model, density=0.1, skip="0"))
        weight                shape    weights  kept    share
        0.weight              8×3×3×3      216   216  100.00%  dense: skip '0'
        2.weight              10×288     2,880   288   10.00%
        total, sparse layers             2,880   288   10.00%
    """
    reasons = reasons_to_skip(module, skip)
    refuse_module(module, reasons)
    every = list(find_weights(module))
    owners = names_of_owners(module)
    weights = [each for each in every if reasons.keys().isdisjoint((*each.names, *owners[each.parameter]))]
    refuse_weights(module, weights)
    given, density = density, 0.1 if density is None else density
    counts = edges_per_weight(weights, density, distribution)
    plan = [(weight.name, [weight], count) for weight, count in zip(weights, counts, strict=True)]
    if distribution == "global":
        plan = [("all layers", weights, kept(sum(weight.numel for weight in weights), density))]
    graphs = [WeightGraph(name, each) for name, each, _ in plan]
    views = [
        graph.prepare(wiring, None if given is None and distribution in DISTRIBUTIONS else count, count)
        for graph, (_, _, count) in zip(graphs, plan, strict=True)
    ]

    # So far the module is unchanged; from here on nothing is refused.
    for graph, view in zip(graphs, views, strict=True):
        graph.take(view)
        _warn_of_zeros(graph)
    table = _table(module, every, graphs, reasons)
    _attach(module, graphs, sparse_kernels)
    return table


def _warn_of_zeros(graph: WeightGraph) -> None:
    """Warn of layers that start from zeros, if a rule takes their first weights, or none, for ever."""
    rule = graph.wiring
    if (rule.gradient or rule.trained) == "all" or isinstance(rule, PruneAndGrow | TargetedDropout):
        return
    zero = [not weight.flat(weight.parameter).any() for weight in graph.weights]
    if not any(zero):
        return
    for weight, is_zero, own in zip(graph.weights, zero, split_index(graph.real_index, graph.weights), strict=True):
        if is_zero and len(own) < weight.numel and own.tolist() == list(range(len(own))):
            what = f"the first {len(own):,}" if len(own) else "0"
            warnings.warn(
                f"{weight.name} is zero: {type(rule).__name__} makes {what} of its {weight.numel:,} weights real, and "
                "others get no gradient: initialise it before, or skip it",
                stacklevel=4,
            )


def _table(
    module: nn.Module, weights: Sequence[LayerWeight], graphs: Sequence[WeightGraph], reasons: Mapping[str, str]
) -> SparsityTable:
    """Return a row per parameter of two or more dimensions; of ``in_proj_weight`` one per projection."""
    real: dict[LayerWeight, int] = {}
    for graph in graphs:
        real |= graph.real_edges_per_weight()
    parts: dict[Tensor, list[LayerWeight]] = {}
    for weight in weights:
        parts.setdefault(weight.parameter, []).append(weight)
    rows = []
    owners, shared = dict(module.named_modules()), names_of_owners(module)
    for name, parameter in module.named_parameters():
        if is_lazy(parameter) or parameter.dim() < 2:
            continue
        found = parts.get(parameter, [])
        for part in (each for each in found if each.layer is found[0].layer):
            names = (*part.names, *shared[parameter])
            reason = "" if part in real else next(reasons[each] for each in names if each in reasons)
            shown = part.name if len(shared[parameter]) == 1 else " and ".join(shared[parameter])
            rows.append(SparsityRow(shown, tuple(part.shape), part.numel, real.get(part, part.numel), reason))
        if parameter not in parts:
            reason = reasons.get(name) or f"parameter of {type(owners[name.rpartition('.')[0]]).__name__}"
            rows.append(SparsityRow(name, tuple(parameter.shape), parameter.numel(), parameter.numel(), reason))
    return SparsityTable(tuple(rows))


def _attach(module: nn.Module, graphs: Sequence[WeightGraph], sparse_kernels: bool) -> None:
    """Parametrize the weights, and make all modules around them choose edges when their forward pass begins."""
    parts: dict[tuple[nn.Module, str], list[tuple[LayerWeight, WeightGraph]]] = {}
    for graph in graphs:
        for weight in graph.weights:
            parts.setdefault((weight.layer, weight.parameter_name), []).append((weight, graph))
    orders = {layer: tuple(name for name, _ in own_parameters(layer)) for layer, _ in parts}
    registered: set[WeightGraph] = set()
    for (layer, name), found in parts.items():
        owned = [graph for _, graph in found if graph not in registered]
        registered.update(owned)
        weights = [weight for weight, _ in found]
        edges = sparse_kernels and suits(layer) and not weights[0].transposed
        real = RealWeights(weights, [graph for _, graph in found], owned, orders[layer], edges)
        parametrize.register_parametrization(layer, name, real, unsafe=True)
    for layer in orders:
        own_class: Any = type(layer)
        # For ``densify``: other parametrizations keep the class.
        own_class.before_sparse = {key: getattr(own_class, key) for key in ("forward", "__getstate__", "__setattr__")}
        own_class.__getstate__, own_class.__setattr__ = _refuse_pickling, _assign(own_class.__setattr__)
        chain = sparse_chain(layer, "weight")
        if chain is not None and chain[0].over_edges:
            own_class.forward = over_edges(own_class.forward)
        layer.register_load_state_dict_pre_hook(before_loading)
    for each in module.modules():
        if below := dict.fromkeys(real for _, _, _, real in sparse_parameters(each)):
            forward_pass = ForwardPass(tuple(below), each, splits=each is module)
            if each is module:
                each.register_state_dict_pre_hook(forward_pass.settle)
                each.register_load_state_dict_pre_hook(forward_pass.settle)
            each.register_forward_pre_hook(forward_pass.begin)
            each.register_forward_hook(forward_pass.end, always_call=True)


def _assign(otherwise: Callable[[nn.Module, str, Any], None]) -> Callable[[nn.Module, str, Any], None]:
    """Return a ``__setattr__`` that makes an assigned parameter the candidates; otherwise it calls another one."""

    def assign(layer: nn.Module, name: str, value: Any) -> None:
        chain: Any = isinstance(value, Tensor) and sparse_chain(layer, name)
        if chain:
            _refuse_swap(chain[0], value)
        if isinstance(value, nn.Parameter):
            if chain and len(chain) > 1:
                value = value.detach()
            elif chain:
                chain[0].take(value)
                layer, name = chain, "original"
        otherwise(layer, name, value)

    return assign


def _refuse_swap(real: RealWeights, value: Tensor) -> None:
    """Refuse assignments that would be undone later by assigning the values read before, which lack candidates."""
    original = name_of_candidates(real.name)
    if isinstance(value, ReadWeight):
        raise InputError(
            f"{real.name} is sparse, and values read from a sparse weight are not its candidates: save and assign "
            f"{original} instead, or give a clone()"
        )
    if any(frame.f_code.co_name == "functional_call" for frame in frames_of(inspect.currentframe())):
        raise InputError(f"{real.name} is sparse: give functional_call its candidates, by the name {original}")


def _refuse_pickling(module: nn.Module) -> NoReturn:
    raise InputError(
        f"a module with sparse weights cannot be pickled ({type(module).__name__}): save its state_dict(), or "
        "densify(…) it first"
    )
