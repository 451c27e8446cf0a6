"""The parameters that rules own, such as the threshold of STR, in an optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer

from dnw_graph._compat import unwrapped_name
from dnw_graph.errors import InputError
from dnw_graph.ranking import rankings
from dnw_graph.wirings import Wiring

CLOSED = (Adagrad, getattr(torch.optim, "Muon", Adagrad))
"""Optimisers that take no scalar after their creation: one creates state only then, one steps matrices only."""


def own_decay(model: nn.Module) -> dict[Tensor, float]:
    """Return the parameters of a model's rules, each with its weight decay."""
    wirings = [module for module in model.modules() if isinstance(module, Wiring)]
    return {parameter: wiring.weight_decay for wiring in wirings for parameter in wiring.parameters()}


class RuleParameters:
    """Gives the parameters of a model's rules to an optimiser, each with its own weight decay.

    They have groups of their own only while the optimiser steps, so that every optimiser applies the decay in its own
    way, while schedulers, names and checkpoints always see the groups that the optimiser was created with.

    Args:
        model: The model.
        optimizer: Its optimiser. Nothing is changed yet.
        others: Other optimisers of the model; what they have is not missing.

    Attributes:
        decays: The parameters that the optimiser, or another one, has or gets, each with its weight decay.

    Raises:
        InputError: If a parameter is missing and cannot be added, or the optimiser has no weight decay but a parameter
            needs one.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, others: Iterable[Optimizer] = ()) -> None:
        self.decays: dict[Tensor, float] = {}
        self._missing: list[tuple[dict[str, Any], str, Tensor]] = []
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._num_groups = 0
        kind, groups = type(optimizer).__name__, parameter_groups(optimizer)
        elsewhere = {parameter for other in others for parameter in parameter_groups(other)}
        names = {parameter: unwrapped_name(name) for name, parameter in model.named_parameters()}
        for _, graph in rankings(model):
            like = next((groups[each.parameter] for each in graph.weights if each.parameter in groups), None)
            for parameter in graph.wiring.parameters():
                group = groups.get(parameter)
                missing = group is None and parameter not in elsewhere
                if missing and (like is None or not parameter.requires_grad):
                    continue
                name, decay = names[parameter], graph.wiring.weight_decay
                self.decays[parameter] = decay
                group = like if missing else group
                if group is None:
                    continue
                if decay and parameter.requires_grad and "weight_decay" not in group:
                    raise InputError(
                        f"{kind} has no weight decay, but {name} needs {decay:g}: give "
                        f"{type(graph.wiring).__name__} weight_decay=0, or use SGD or Adam"
                    )
                if missing:
                    if isinstance(optimizer, CLOSED):
                        raise InputError(
                            f"{kind} was created without {name} and cannot add it: create it after sparsify or rewire, "
                            "or give the parameter to another optimiser and attach that one"
                        )
                    self._missing.append((group, name, parameter))

    def add_missing(self) -> None:
        """Add parameters that the optimiser lacks to the group of their graph's weights."""
        for group, name, parameter in self._missing:
            group["params"].append(parameter)
            if "param_names" in group:
                group["param_names"].append(name)

    def begin(self, optimizer: Optimizer) -> None:
        """Split groups by weight decay."""
        self._num_groups = len(optimizer.param_groups)
        for group in list(optimizer.param_groups):
            common = group.get("weight_decay", 0.0)
            places: dict[float, list[int]] = {}
            for place, parameter in enumerate(group["params"]):
                places.setdefault(self.decays.get(parameter, common), []).append(place)
            if not places.keys() - {common}:
                continue
            lists = [key for key in ("params", "param_names") if key in group]
            self._before.append((group, {key: group[key] for key in ("weight_decay", *lists)}))
            first, *rest = (
                {"weight_decay": decay, **{key: [group[key][place] for place in own] for key in lists}}
                for decay, own in places.items()
            )
            optimizer.param_groups += [{**group, **part} for part in rest]
            group.update(first)

    def end(self, optimizer: Optimizer) -> None:
        """Restore the groups, also after a step that raised an error."""
        if self._before:
            del optimizer.param_groups[self._num_groups :]
        for group, before in self._before:
            group.update(before)
        self._before = []


def parameter_groups(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Return the parameters of an optimiser, each with its group."""
    return {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
