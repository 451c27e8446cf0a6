"""Checks whether a module behaves as its class does, and how it behaves in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from dnw_graph._compat import has_own_hooks


def as_its_class(module: nn.Module) -> bool:
    """Return whether a module has the methods of its class and no hooks."""
    return keeps_methods(module) and not has_own_hooks(module)


def keeps_methods(module: nn.Module) -> bool:
    """Return whether none of a module's methods, such as ``forward``, was replaced on the object.

    Libraries that offload, wrap or patch layers replace methods.
    """
    return vars(module).keys().isdisjoint(_methods(type(module)))


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
