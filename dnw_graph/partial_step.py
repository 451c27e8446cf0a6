"""Optimiser steps on some elements of the parameters, at the cost of those alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

ELEMENTWISE = (SGD, Adam, AdamW, NAdam, RAdam, RMSprop)
"""Elementwise optimisers: each element is updated from its own gradient and state only. Subclasses may differ."""
LARGEST = 0.25  # Share of a parameter's elements up to which gathering them pays.


def can_be_partial(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Return whether an optimiser can step on some elements of a parameter only; on a GPU that is not faster."""
    return (
        type(optimizer) in ELEMENTWISE
        and not torch.compiler.is_compiling()
        and parameter.device.type == "cpu"
        and parameter.is_contiguous()
    )


class PartialStep:
    """A step on vectors of some elements of the parameters.

    Every element is updated as in a full step. All others keep value and optimiser state, bit for bit; state that the
    step has created is zero there. If the step raises an error, these parameters and the optimiser are unchanged.

    Args:
        optimizer: The optimiser.
        trained: Positions of the elements in each parameter as one vector.

    Attributes:
        stand_in: Steps in place of the optimiser, whose groups and state must not hold vectors after an error.
    """

    def __init__(self, optimizer: Optimizer, trained: Mapping[Tensor, Int[Tensor, " trained"]]) -> None:
        self._optimizer, self._trained = optimizer, trained
        self._vectors: dict[Tensor, Tensor] = {}
        self.stand_in: Optimizer = object.__new__(type(optimizer))
        vars(self.stand_in).update(vars(optimizer))

    def begin(self) -> None:
        """Take the elements, their gradients, which must be there, and their state."""
        before = self._optimizer.state
        states: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict, before)
        for parameter, positions in self._trained.items():
            vector = nn.Parameter(_taken(parameter.detach(), positions), parameter.requires_grad)
            if parameter.grad is not None:
                vector.grad = _taken(parameter.grad, positions)
            self._vectors[parameter] = vector
            if parameter in before:
                states[vector] = {
                    name: _taken(value, positions) if _fits(value, parameter) else _copy(value)
                    for name, value in before[parameter].items()
                }
        self.stand_in.state = states
        self.stand_in.param_groups = [
            {**group, "params": [self._vectors.get(each, each) for each in group["params"]]}
            for group in self._optimizer.param_groups
        ]

    def end(self) -> None:
        """Write back the results of the step."""
        states = dict(self.stand_in.state)
        for parameter, vector in self._vectors.items():
            positions = self._trained[parameter]
            parameter.detach().view(-1).index_copy_(0, positions, vector.detach())
            if vector in states:
                state = self._optimizer.state[parameter]
                for name, value in states.pop(vector).items():
                    if _fits(value, vector):
                        if not _fits(state.get(name), parameter):
                            state[name] = torch.zeros_like(parameter, dtype=value.dtype)
                        state[name] = state[name].contiguous()  # A checkpoint may have had another memory format.
                        state[name].view(-1).index_copy_(0, positions, value)
                    else:
                        state[name] = value
        self._optimizer.state.update({each: state for each, state in states.items() if each not in self._trained})


def _taken(value: Tensor, positions: Tensor) -> Tensor:
    return value.reshape(-1).index_select(0, positions)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _fits(value: object, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape
