"""Optimisers by name or class path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from dnw_graph.errors import InputError, unknown_name

OPTIMIZERS = {"adamw": "torch.optim.AdamW", "sgd": "torch.optim.SGD"}
"""Class paths by name; give others by their class path."""


def make_optimizer(
    name: str, groups: Iterable[dict[str, Any]], common: Mapping[str, Any], options: Mapping[str, Any]
) -> Optimizer:
    """Return an optimiser.

    Args:
        name: One of ``OPTIMIZERS``, or the class path of an optimiser.
        groups: Groups of parameters.
        common: Learning rate, weight decay, momentum: each is passed if the optimiser has that argument.
        options: Further arguments.

    Raises:
        InputError: If there is no such optimiser, or it does not take the options.
    """
    module, _, kind = OPTIMIZERS.get(name, name).rpartition(".")
    if not module:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    try:
        cls = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--optimizer is {name!r}, which cannot be imported ({error}): give package.Class") from error
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise InputError(f"--optimizer is {name!r}, which is not a torch.optim.Optimizer: give the class path of one")
    known = inspect.signature(cls).parameters
    try:
        return cls(groups, **{key: value for key, value in common.items() if key in known}, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"--optimizer {name} does not take --optimizer-options {dict(options)}: {error}") from error
