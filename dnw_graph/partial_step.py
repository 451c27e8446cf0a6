"""Optimiser steps on some elements of the parameters, at the cost of those alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

ELEMENTWISE = (SGD, Adam, AdamW, NAdam, RAdam, RMSprop)
"""Elementwise optimisers: each element is updated from its own gradient and state only. Subclasses may differ."""
LARGEST = 0.25  # Share of a parameter's elements up to which gathering them pays.


def can_be_partial(optimizer: Optimizer, parameter: Tensor, num_trained: int) -> bool:
    """Return whether an optimiser can step on only this many elements of a parameter, and whether that is faster."""
    return (
        type(optimizer) in ELEMENTWISE
        and not torch.compiler.is_compiling()
        and parameter.device.type == "cpu"
        and parameter.is_contiguous()
        and num_trained <= LARGEST * parameter.numel()
    )


class PartialStep:
    """Replaces the parameters of an optimiser by vectors of some of their elements, for one step.

    Every element is updated as in a full step. All others keep value and optimiser state, bit for bit; state that the
    step has created is zero there.

    Args:
        optimizer: The optimiser.
        trained: Positions of the elements in each parameter as one vector.
    """

    def __init__(self, optimizer: Optimizer, trained: Mapping[Tensor, Int[Tensor, " trained"]]) -> None:
        self._optimizer, self._trained = optimizer, trained
        self._vectors: dict[Tensor, Tensor] = {}

    def begin(self) -> None:
        """Replace the parameters, which must have their gradients."""
        for parameter, positions in self._trained.items():
            vector = nn.Parameter(parameter.detach().view(-1).index_select(0, positions), parameter.requires_grad)
            if parameter.grad is not None:
                vector.grad = parameter.grad.reshape(-1).index_select(0, positions)
            self._vectors[parameter] = vector
            if parameter in self._optimizer.state:
                state: dict[str, Any] = self._optimizer.state[parameter]
                self._optimizer.state[vector] = {
                    name: value.reshape(-1).index_select(0, positions) if _fits(value, parameter) else value
                    for name, value in state.items()
                }
        self._exchange(self._vectors)

    def end(self) -> None:
        """Write back the results of the step, and restore the optimiser's parameters."""
        states = self.undo()
        for parameter, vector in self._vectors.items():
            positions = self._trained[parameter]
            parameter.detach().view(-1).index_copy_(0, positions, vector.detach())
            if vector in states:
                state = self._optimizer.state[parameter]
                for name, value in states[vector].items():
                    if _fits(value, vector):
                        if not _fits(state.get(name), parameter):
                            state[name] = torch.zeros_like(parameter, dtype=value.dtype)
                        state[name].view(-1).index_copy_(0, positions, value)
                    else:
                        state[name] = value

    def undo(self) -> dict[Tensor, dict[str, Any]]:
        """Restore the optimiser's parameters, also after a step that raised an error.

        Returns:
            The states of the vectors.
        """
        self._exchange({vector: parameter for parameter, vector in self._vectors.items()})
        state = self._optimizer.state
        return {vector: state.pop(vector) for vector in self._vectors.values() if vector in state}

    def _exchange(self, others: Mapping[Tensor, Tensor]) -> None:
        for group in self._optimizer.param_groups:
            group["params"] = [others.get(each, each) for each in group["params"]]


def _fits(value: object, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape
