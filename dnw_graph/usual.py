"""Checks whether a module behaves as its class does, and how it behaves in evaluation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from dnw_graph._compat import has_own_hooks


def as_its_class(module: nn.Module) -> bool:
    """Return whether a module has the methods of its class and no hooks."""
    return keeps_methods(module) and not has_own_hooks(module)


def keeps_methods(module: nn.Module) -> bool:
    """Return whether none of a module's methods, such as ``forward``, was replaced on the object.

    Libraries that offload, wrap or patch layers replace methods.
    """
    return vars(module).keys().isdisjoint(_methods(type(module)))


def histories(model: nn.Module) -> dict[int, Tensor]:
    """Return, by ``id``, without their history the weights that a model's hooks computed, as in PyTorch's pruning."""
    attributes = (each for module in model.modules() for each in vars(module).values())
    return {id(each): each.detach().clone() for each in attributes if isinstance(each, Tensor) and each.grad_fn}


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model, also of one with weights that have a history, which PyTorch does not copy."""
    return copy.deepcopy(model, histories(model))


def first_floats(model: nn.Module) -> Tensor:
    """Return a tensor of a model, whose dtype and device are those of its inputs; compact models have no parameters."""
    return next(tensor for tensor in model.state_dict().values() if tensor.is_floating_point())


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode for a while; afterwards every module has its own mode again."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# Weak, because every parametrized layer has a class of its own.
_METHODS: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def _methods(kind: type) -> frozenset[str]:
    if kind not in _METHODS:
        _METHODS[kind] = frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))
    return _METHODS[kind]
