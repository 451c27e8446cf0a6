"""Loads the state of the dense model's optimiser into one of the sparse model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.arguments import checked, wrong
from dnw_graph.errors import InputError
from dnw_graph.sparse_layers.access import sparse_parameters
from dnw_graph.sparse_layers.layers import own_parameters


@checked
def load_optimizer_state(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any], module: nn.Module) -> None:
    """Load the state of an optimiser created before ``sparsify`` or ``densify`` into one created afterwards.

    ``Optimizer.load_state_dict`` matches parameters by position, but a sparse layer lists its parameters in another
    order than a dense one. This function matches by name: by the names in the state (if the optimiser was created from
    ``named_parameters()``), or else by those of the dense model, group by group in its order. An optimiser that stays
    in use does not need it.

    Args:
        optimizer: The optimiser of the module's parameters as they are now.
        state_dict: The earlier optimiser's ``state_dict()``: of the dense model, or with names.
        module: The module.

    Raises:
        InputError: Before anything is loaded, if the groups hold other parameters, or a state has another shape than
            its parameter.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise wrong("state_dict", "what state_dict() of an optimiser returned", list(state_dict))
    names = {id(parameter): name for name, parameter in dense_named_parameters(module)}
    place = {name: number for number, name in enumerate(names.values())}
    ids = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    old_groups = state_dict["param_groups"]
    if len(ids) != len(old_groups):
        raise InputError(f"the optimiser has {len(ids)} groups of parameters, the state has {len(old_groups)}")
    state, groups = {}, []
    for number, (group, new_ids, old) in enumerate(zip(optimizer.param_groups, ids, old_groups, strict=True)):
        if strange := [tuple(p.shape) for p in group["params"] if id(p) not in names]:
            raise InputError(f"the optimiser has parameters that the module lacks, with shapes {strange}")
        own = [names[id(parameter)] for parameter in group["params"]]
        known = [_dense_name(name, place) for name in old.get("param_names") or sorted(own, key=place.__getitem__)]
        if sorted(known) != sorted(own) or len(known) != len(old["params"]):
            raise InputError(
                f"group {number} of the optimiser has {len(own)} parameters, that of the state {len(old['params'])} or "
                "different ones: create the optimiser with the same groups as before"
            )
        before = dict(zip(known, old["params"], strict=True))
        for name, new_id, parameter in zip(own, new_ids, group["params"], strict=True):
            if before[name] in state_dict["state"]:
                state[new_id] = state_dict["state"][before[name]]
                _check_shapes(name, parameter, state[new_id])
        groups.append({**old, "params": new_ids})
        if "param_names" in group:
            groups[-1]["param_names"] = group["param_names"]
    optimizer.load_state_dict({**state_dict, "state": state, "param_groups": groups})


def dense_named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with the names and in the order of the model without sparse weights."""
    sparse: dict[nn.Module, dict[str, Any]] = {}
    for _, layer, name, real in sparse_parameters(module):
        chain: Any = layer.parametrizations[name]  # type: ignore[index]
        sparse.setdefault(layer, dict.fromkeys(real.order))[name] = chain.original
    seen: set[nn.Parameter] = set()
    # A layer comes before its parametrizations, whose parameter has been yielded by then.
    for path, each in module.named_modules():
        for name, parameter in {**sparse.get(each, {}), **dict(own_parameters(each))}.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{path}.{name}" if path else name, parameter


def _dense_name(name: str, known: Collection[str]) -> str:
    """Return the name that a parameter has without sparse weights; other parametrizations keep theirs."""
    return name if name in known else name.replace("parametrizations.", "").removesuffix(".original")


def _check_shapes(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.dim():
            continue
        # Adafactor stores means over rows and columns: dimensions of length 1.
        sides = zip(value.shape, parameter.shape, strict=False)
        if value.dim() != parameter.dim() or any(a not in (1, b) for a, b in sides):
            raise InputError(
                f"{key} of {name} has shape {list(value.shape)}, the parameter {list(parameter.shape)}: the state "
                "belongs to another model, or to other parameter groups"
            )
