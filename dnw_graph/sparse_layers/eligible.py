"""Decides which layers stay dense, and refuses layers that cannot be made sparse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dnw_graph.errors import InputError, unknown_name
from dnw_graph.sparse_layers.access import sparse_parameters
from dnw_graph.sparse_layers.layers import LayerWeight, find_weights, own_parameters
from dnw_graph.sparse_layers.trying import refuse_other_values

Skip = str | type[nn.Module]


def reasons_to_skip(module: nn.Module, skip: Skip | Iterable[Skip]) -> dict[str, str]:
    """Return why modules and parameters stay dense, by name: those that ``skip`` matches, and all inside them.

    Raises:
        InputError: If an entry is neither a pattern nor a type of module, or matches nothing.
    """
    entries = list(skip) if isinstance(skip, Iterable) and not isinstance(skip, str) else [skip]
    modules = dict(module.named_modules(remove_duplicate=False))
    parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    parameters += [name for weight in find_weights(module) if weight.third is not None for name in weight.names]
    names = [name for name in (*modules, *parameters) if name]
    reasons: dict[str, str] = {}
    for entry in entries:
        if isinstance(entry, str):
            matched = [name for name in names if fnmatchcase(name, entry)]
            reason = f"skip {entry!r}"
            if not matched:
                raise unknown_name("module or parameter to skip", entry, names)
        elif isinstance(entry, type) and issubclass(entry, nn.Module):
            matched = [name for name, each in modules.items() if isinstance(each, entry)]
            reason = f"skip {entry.__name__}"
            if not matched:
                kinds = sorted({type(each).__name__ for each in modules.values()})
                raise InputError(f"no module to skip is a {entry.__name__}: there are {', '.join(kinds)}")
        else:
            raise InputError(f"skip takes name patterns and types of modules; got {entry!r}")
        for name in matched:
            reasons.setdefault(name, reason)
    inside = {name: _reason(name, reasons) for name in names}
    return {name: reason for name, reason in inside.items() if reason} | reasons


def _reason(name: str, reasons: Mapping[str, str]) -> str | None:
    """Return why something stays dense, because of itself or of a module around it."""
    parts = name.split(".")
    around = [".".join(parts[:stop]) for stop in range(len(parts) + 1)]
    return next((reasons[each] for each in around if each in reasons), None)


def refuse_module(module: nn.Module, reasons: Mapping[str, str]) -> None:
    """Refuse a module with layers that cannot be made sparse.

    Raises:
        InputError: If it is scripted or data-parallel already, or a layer that is not skipped is lazy, quantised or
            already sparse.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError("a scripted module cannot be changed: make its weights sparse before torch.jit")
    for path, layer in module.named_modules():
        if path in reasons:
            continue
        # Only when wrapping are the weights, edges and parameters of rules that each process has drawn made equal.
        if isinstance(layer, nn.parallel.DistributedDataParallel) and layer.process_group.size() > 1:
            raise InputError(f"{path or 'the module'} is a DistributedDataParallel already: sparsify before wrapping")
        if ".quantized" in type(layer).__module__:
            raise InputError(
                f"{path or 'the module'} is quantised ({type(layer).__name__}): sparsify before, or skip it"
            )
        if any(is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
            raise InputError(f"{path or 'the module'} is lazy: send a batch through the module first, or skip it")
    for path, _, name, _ in sparse_parameters(module):
        full = f"{path}.{name}" if path else name
        if path not in reasons and full not in reasons:
            raise InputError(f"{full} is already sparse: densify(…) it first, or skip it")


def names_of_owners(module: nn.Module) -> dict[Tensor, list[str]]:
    """Return the names of every parameter, one per module and attribute that holds it."""
    owners: dict[Tensor, list[str]] = {}
    for path, layer in module.named_modules():
        for name, own in own_parameters(layer):
            owners.setdefault(own, []).append(f"{path}.{name}" if path else name)
    return owners


def refuse_weights(module: nn.Module, weights: Sequence[LayerWeight]) -> None:
    """Refuse weights that cannot be ranked.

    Raises:
        InputError: If there are no weights, or one is shared by two layers, not of real numbers or without values.
    """
    if not weights:
        raise InputError(
            f"{type(module).__name__} has no weight to make sparse: no linear layer, convolution, attention projection "
            "or other layer of register_layer(…), or all of them are skipped"
        )
    owners = names_of_owners(module)
    for weight in weights:
        parameter = weight.parameter
        if len(names := owners[parameter]) > 1:
            raise InputError(f"{' and '.join(names)} are one shared weight: skip one of them, or give each its own")
        if parameter.is_meta:
            raise InputError(f"{weight.name} is on the meta device, without values: initialise it first")
        if not parameter.is_floating_point() or type(parameter) is not nn.Parameter:
            raise InputError(
                f"{weight.name} is a {type(parameter).__name__} of {parameter.dtype}: expected a plain parameter of "
                "floating-point numbers; sparsify before quantising or distributing, or skip it"
            )
        refuse_other_values(weight)
